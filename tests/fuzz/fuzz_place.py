"""The folder that every input starts from: two small runs, an export, texts, a sweep and a study, odd files."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from fuzz_child import Outcome, run_in_child
from helpers.small_run import SMALL

import lightning_moe

CKPT = "runs/a/checkpoints/last.ckpt"
DEVICES = {"full": 7, "null": 3, "zero": 5, "urandom": 9}
#: names under ``odd/`` that no command should take as a file, nor hang at
ODD_FILES = (*DEVICES, "fifo", "socket", "folder", "missing", "dangling", "loop", "unreadable", "binary", "empty")
SWEEP: dict[str, Any] = {
    "name": "s",
    "config": ["small.yaml"],
    "space": {
        "model.routing.init_args.ema_decay": {"float": [0.5, 0.99]},
        "model.optimizer.muon_lr": {"choices": [0.01, 0.02]},
        "threshold_warmup.steps": {"int": [1, 3], "when": {"model.optimizer.muon_lr": 0.01}},
    },
    "objectives": {"val/loss": "minimize"},
    "sampler": {"name": "RandomSampler", "seed": 1},
    "pruner": {"name": "MedianPruner", "n_startup_trials": 1},
    "budget": {"trials": 3, "hours": 1.0},
    "seeds": [1, 2],
}
STUDY: dict[str, Any] = {
    "name": "t",
    "config": ["small.yaml"],
    "tune": {"key": "model.optimizer.muon_lr", "values": [0.01, 0.02], "seed": 100},
    "seeds": [1, 2],
    "baseline": "token_choice",
    "methods": {
        "token_choice": {"include": ["routing/token_choice"]},
        "threshold": {"include": ["routing/expert_threshold"]},
        "threshold_slow": {"as": "threshold", "model.routing.init_args.ema_decay": 0.5},
    },
    "reference": {"source": "a paper", "loss": {"threshold": 2.5}},
}
MLFLOW_RUN = {
    "tracking_uri": "sqlite:///mlflow.db",
    "experiment_name": "lightning_moe",
    "experiment_id": "1",
    "run_id": "0" * 32,
    "sent_metrics": 0,
    "sent_journal": 0,
}


def import_everything() -> None:
    """Import all of the package, so that forks need not."""
    for module in pkgutil.walk_packages(lightning_moe.__path__, "lightning_moe."):
        if not module.name.endswith("__main__") and not {"remote", "evaluation"} & set(module.name.split(".")):
            importlib.import_module(module.name)
    for name in ("matplotlib.pyplot", "optuna.samplers", "mlflow.tracking", "torch._dynamo", "lightning.pytorch.cli"):
        importlib.import_module(name)


class Place:
    """A template folder, and copies of it in which command lines run.

    Args:
        root: empty folder for everything.
        seconds: time that a command line may take.
    """

    def __init__(self, root: Path, seconds: float = 60) -> None:
        self.root, self.seconds = root, seconds
        self.template, self.work = root / "template", root / "work"
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        self.environment = kept | {
            "XDG_STATE_HOME": str(root / "state"),
            "LIGHTNING_MOE_CACHE": str(root / "cache"),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "MPLCONFIGDIR": tempfile.gettempdir(),
        }
        self.template.mkdir()
        self._fill()

    def run(self, argv: list[str], folder: Path | None = None) -> Outcome:
        return run_in_child(argv, folder or self.work, self.environment, self.seconds)

    def fresh(self) -> Path:
        """Return the working folder as it was at the beginning."""
        remove(self.work)
        copy(self.template, self.work)
        return self.work

    def _fill(self) -> None:
        folder = self.template
        (folder / "text").mkdir()
        for number in range(60):
            lines = [f"line {i} of file {number} says {(i * number) % 97} in words" for i in range(12)]
            (folder / "text" / f"{number:03}.txt").write_text("\n".join(lines))
        corpus = {"class_path": "LocalFiles", "init_args": {"paths": ["text"]}}
        trainer = SMALL["trainer"] | {"max_steps": 1, "val_check_interval": 1, "limit_val_batches": 1}
        decoder = SMALL["model"]["decoder"] | {"hidden_size": 16, "num_experts": 2}
        config = SMALL | {
            "model": SMALL["model"] | {"decoder": decoder},
            "data": SMALL["data"] | {"corpus": corpus},
            "trainer": trainer | {"limit_test_batches": 1, "limit_predict_batches": 1},
            "threshold_warmup": {"steps": 0},
        }
        (folder / "small.yaml").write_text(yaml.safe_dump(config))
        (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
        (folder / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
        (folder / "own.txt").write_text("line 3 of file 4 says 12 in words\n" * 60)
        (folder / "prompts.txt").write_text("line 3\nfile\n")
        for name, seed in (("a", "1"), ("b", "2")):
            self._make("fit", "--config=small.yaml", f"--run_name={name}", f"--seed_everything={seed}")
        self._make("validate", "--ckpt_path", CKPT)
        self._make("export", "--ckpt_path", CKPT, "--output", "exported")
        shutil.copy(folder / "runs/a/tokenizer.json", folder / "tokenizer.json")
        (folder / "runs/a/segments.json").write_text("[]")
        (folder / "runs/a/mlflow_run.json").write_text(json.dumps(MLFLOW_RUN))
        odd = folder / "odd"
        odd.mkdir()
        (odd / "folder").mkdir()
        (odd / "binary").write_bytes(bytes(range(256)) * 4)
        (odd / "empty").write_bytes(b"")
        (odd / "unreadable").write_text("text")
        (odd / "unreadable").chmod(0)
        add_special_files(odd)

    def _make(self, *argv: str) -> None:
        outcome = self.run(list(argv), self.template)
        assert outcome.code == 0, (argv, outcome)


def add_special_files(odd: Path) -> None:
    """Make devices, a FIFO, a socket and links. Without the right to make a device, a link to it is read only."""
    os.mkfifo(odd / "fifo")
    make_socket(odd / "socket")
    (odd / "dangling").symlink_to("nowhere")
    (odd / "loop").symlink_to("loop")
    for name, minor in DEVICES.items():
        try:
            os.mknod(odd / name, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
        except PermissionError:
            (odd / name).symlink_to(f"/dev/{name}")


def copy(source: Path, target: Path) -> None:
    """Copy a folder with times, links and special files."""
    target.mkdir()
    for path in source.iterdir():
        new, info = target / path.name, path.lstat()
        if stat.S_ISLNK(info.st_mode):
            new.symlink_to(path.readlink())
        elif stat.S_ISREG(info.st_mode):
            shutil.copy2(path, new)
        elif stat.S_ISDIR(info.st_mode):
            copy(path, new)
        elif stat.S_ISSOCK(info.st_mode):
            make_socket(new)
        else:
            os.mknod(new, info.st_mode, info.st_rdev)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, suppress(OSError):  # its path may be too long
        listener.bind(str(path))


def remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def snapshot(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Return kind, size and time of every file, and the kind of all else."""
    return dict(_walk(folder, ""))


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for entry in os.scandir(folder):
        info = entry.stat(follow_symlinks=False)
        if stat.S_ISREG(info.st_mode):
            yield f"{prefix}{entry.name}", ("file", info.st_size, info.st_mtime_ns)
        else:
            yield f"{prefix}{entry.name}", (stat.S_IFMT(info.st_mode),)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/")
