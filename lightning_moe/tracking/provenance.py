"""What a result was made with: the code, the libraries, the machine. Nothing names a person or a host."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import lightning_moe
from lightning_moe.processes import usable_cores

LIBRARIES = ("lightning", "mlflow")


def provenance() -> dict[str, str]:
    """Return tags of a run: ``git_commit`` and ``git_dirty`` (if the package runs from a checkout), ``version.*``,
    ``platform`` and ``device``."""
    return {
        **git_state(Path(lightning_moe.__file__)),
        **versions(),
        "platform": platform.platform(),
        "device": device(),
    }


def git_state(file: Path) -> dict[str, str]:
    """Return the commit of the repository that tracks ``file``, and "true" or "false" for whether the code differs.

    The result is empty if no repository tracks it: an installed package may lie inside the checkout of another project.
    """

    def git(*args: str) -> str:
        command = ["git", "-C", str(file.parent), *args]
        # without optional locks `status` does not touch the index, which another git may be using
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        changed = git("status", "--porcelain", ".")
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": "true" if changed else "false"}
    except (OSError, subprocess.SubprocessError):
        return {}


def versions() -> dict[str, str]:
    """Return ``version.<name>`` of Python, this package and the libraries that decide results.

    That of torch also says for which CUDA it was built, as in ``2.11.0+cu130``.
    """
    import torch

    found = {"version.python": platform.python_version(), "version.lightning_moe": lightning_moe.__version__}
    for name in LIBRARIES:
        try:
            found[f"version.{name}"] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"version.torch": str(torch.__version__)}


def device() -> str:
    """Return the GPUs that PyTorch sees, or the CPU, such as ``2 × NVIDIA H100 80GB HBM3``."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    return f"CPU, {usable_cores()} cores: {_cpu_name()}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
