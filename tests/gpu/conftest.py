"""The device of the GPU's tests, one process group at a time, and no skip without its reason.

`make test-gpu` runs them on one CUDA GPU. With ``LIGHTNING_MOE_GPU_TESTS_ON=cpu`` they run on the CPU, as a rehearsal.
"""

import os
from collections.abc import Callable, Iterator

import pytest
import torch

VARIABLE = "LIGHTNING_MOE_GPU_TESTS_ON"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or the CPU in a rehearsal."""
    wanted = os.environ.get(VARIABLE, "cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        reason = "was built without CUDA" if torch.version.cuda is None else "finds no usable GPU and driver"
        pytest.fail(f"torch {torch.__version__} {reason}; for a rehearsal on the CPU set {VARIABLE}=cpu", pytrace=False)
    return torch.device(wanted, 0) if wanted == "cuda" else torch.device(wanted)


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """The GPU, for what a CPU cannot show."""
    if device.type != "cuda":
        pytest.skip("rehearsal on the CPU: this needs CUDA's allocator, its streams or the size of its tests")
    return device


@pytest.fixture
def accelerator(device: torch.device) -> dict[str, object]:
    """Arguments of Lightning's trainer for the device."""
    return {"accelerator": "gpu" if device.type == "cuda" else "cpu", "devices": 1}


@pytest.fixture
def flags(device: torch.device) -> tuple[str, ...]:
    """Flags of `fit` for the device; small models train in less time than they compile."""
    return ("--config=trainer/gpu", "--model.compile=false") if device.type == "cuda" else ("--config=trainer/cpu",)


@pytest.fixture
def alone() -> Iterator[None]:
    """A test that makes a process group: it is gone afterwards, and so are the variables that it leaves."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.fixture(autouse=True)
def _clean_device(device: torch.device) -> Iterator[Callable[[], None]]:
    """Each test begins with fresh compiled code and the allocator's books at zero."""

    def clean() -> None:
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)

    clean()
    yield clean
    clean()
