"""Real runs in subprocesses that faults end, and what is left of them compared with a run that nothing happened to."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_moe.config.settings import settings
from lightning_moe.runs.folder import last_checkpoint
from lightning_moe.tracking import read_metrics

MAIN = Path(__file__).with_name("faulty_main.py")
PATIENCE = 900.0  # of a machine that is busy with much else
STEPS = 14

#: the run crosses an epoch's end; checkpoints, logging and validation have intervals of which none divides another
CONFIG: dict[str, Any] = {
    "model": {
        "decoder": {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "num_experts": 4},
        "schedule": {"adamw_warmup_steps": 1},
    },
    "data": {
        "sequence_length": 16,
        "global_batch_size": 8,
        "validation_batch_size": 4,
        "tokenizer": {"vocab_size": 300},
    },
    "threshold_warmup": {"steps": 5},
    "checkpoint": {"every_n_train_steps": 3, "keep_all": True},
    "tracking": {"enabled": False},
    "trainer": {
        "max_steps": STEPS,
        "accumulate_grad_batches": 2,
        "val_check_interval": 8,  # batches: every 4 steps
        "limit_val_batches": 3,
        "log_every_n_steps": 2,
        "gradient_clip_val": 1.0,
        "enable_progress_bar": False,
    },
}

LAYOUTS = {
    "1 process": (),
    "DDP × 2": ("--config", "trainer/ddp", "--trainer.accelerator=cpu", "--trainer.devices=2"),
    "FSDP2 × 2": ("--config", "trainer/fsdp", "--trainer.accelerator=cpu", "--trainer.devices=2"),
    "FSDP2 × 2, sharded checkpoint": (
        "--config",
        "trainer/fsdp",
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
        "--trainer.strategy.save_distributed_checkpoint=true",
    ),
    "expert parallel × 2": (
        "--config",
        "trainer/expert_parallel",
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
    ),
}


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    output: str
    seconds: float


class Workplace:
    """A folder with a corpus, in which runs are made.

    Args:
        folder: empty.
        layout: a key of `LAYOUTS`.
    """

    def __init__(self, folder: Path, layout: str = "1 process") -> None:
        self.folder, self.layout = folder, layout
        text = folder / "text"
        text.mkdir(parents=True)
        for number in range(20):
            lines = [f"line {i} of file {number} says {(i * number) % 97} in words" for i in range(6)]
            (text / f"{number:03}.txt").write_text("\n".join(lines))
        corpus = {"class_path": "LocalFiles", "init_args": {"paths": [str(text)]}}
        config = CONFIG | {"data": CONFIG["data"] | {"corpus": corpus, "validation_fraction": 0.2}}
        (folder / "small.yaml").write_text(yaml.safe_dump(config))

    def environment(self, cache: str = "cache") -> dict[str, str]:
        """Without what a launcher around the tests may have left there."""
        launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
        own = {name: value for name, value in os.environ.items() if name not in launcher}
        folder = {"LIGHTNING_MOE_CACHE": str(self.folder / cache), "LIGHTNING_MOE_RUN": ""}
        return own | folder | {"OMP_NUM_THREADS": "1"}

    def start(
        self,
        *args: str,
        fault: dict[str, Any] | None = None,
        cache: str = "cache",
        limit: Callable[[], None] | None = None,
    ) -> "Process":
        """Start ``fit`` in a process group of its own.

        Args:
            args: of ``fit``.
            fault: arguments of `faulty_main.Fault`.
            cache: name of the folder of prepared data.
            limit: called in the new process before it becomes Python.
        """
        environment = self.environment(cache) | {"FAULT": json.dumps(fault) if fault else ""}
        command = [sys.executable, str(MAIN), "fit", "--config", "small", *LAYOUTS[self.layout], *args]
        return Process(command, self.folder, environment, limit)

    def fit(self, *args: str, fault: dict[str, Any] | None = None, cache: str = "cache") -> Ended:
        """``fit``, until it ends."""
        return self.start(*args, fault=fault, cache=cache).wait()

    def run(self, name: str, output_dir: str = "runs") -> "RunFiles":
        return RunFiles(self.folder / output_dir / name)

    def check_continues(self, name: str, *args: str, output_dir: str = "runs") -> None:
        """Let the run ``name`` go on to its end, and compare it with the run ``whole``, bit for bit."""
        done = self.fit(f"--run_name={name}", "--ckpt_path=last", f"--output_dir={output_dir}", *args)
        assert done.code == 0, done.output
        ours, whole = self.run(name, output_dir), self.run("whole")
        assert differences(ours.checkpoint(), whole.checkpoint()) == []
        assert ours.metrics() == whole.metrics()


class Process:
    """A started command; its group is killed when the block ends."""

    def __init__(
        self, command: list[str], folder: Path, environment: dict[str, str], limit: Callable[[], None] | None
    ) -> None:
        self.began = time.monotonic()
        self.folder = folder
        for name in ("fault-reached", "go-on"):
            (folder / name).unlink(missing_ok=True)
        self.log = folder / "output.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=limit,
            )

    def wait(self) -> Ended:
        """Until the first process has ended; whatever is left of its group is then killed."""
        try:
            code = self.process.wait(PATIENCE)
        finally:
            self.kill()
        return Ended(code, self.log.read_text(errors="replace"), time.monotonic() - self.began)

    def wait_for_all(self) -> Ended:
        """Until every process of the group has ended by itself."""
        deadline = time.monotonic() + PATIENCE
        while self.is_alive():
            assert time.monotonic() < deadline, f"still running:\n{self.log.read_text()}"
            time.sleep(0.1)
        return self.wait()

    def is_alive(self) -> bool:
        self.process.poll()  # or it stays as a zombie
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def wait_for_fault(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not (self.folder / "fault-reached").exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, "the point was never reached"
            time.sleep(0.05)

    def go_on(self) -> None:
        """Let a process go that a fault holds."""
        (self.folder / "go-on").touch()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class RunFiles:
    """What a run has left on the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def checkpoint(self, name: str | None = None) -> dict[str, Any] | None:
        """Everything in a checkpoint, by default in that which ``--ckpt_path last`` takes; `None` if there is none."""
        path = last_checkpoint(self.folder) if name is None else self.folder / "checkpoints" / name
        if path is None:
            return None
        return sharded_content(path) if path.is_dir() else torch.load(path, weights_only=True)

    def metrics(self, before_step: int = 10**9) -> list[dict[str, Any]]:
        """The record, without what depends on the clock."""
        return [
            {key: value for key, value in line.items() if key != "time" and not key.startswith("throughput/")}
            for line in read_metrics(self.folder)
            if line["step"] < before_step
        ]


def sharded_content(path: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    content: dict[str, Any] = {}
    _load_state_dict(content, FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return content | torch.load(path / "meta.pt", weights_only=True)


#: Lightning's counters of the last validation, which the next one sets back to zero
NEVER_READ = "/loops/fit_loop/epoch_loop.val_loop.batch_progress"


def differences(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """Where two checkpoints differ by a single bit."""
    if where == NEVER_READ:
        return []
    if where == "/run/config":  # checkpoint intervals and the like are neutral
        ours, theirs = (settings(yaml.safe_load(text)) for text in (ours, theirs))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return [f"{where}: keys {sorted(map(str, ours.keys() ^ theirs.keys()))}"]
        return [line for key in ours for line in differences(ours[key], theirs[key], f"{where}/{key}")]
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple) and len(ours) == len(theirs):
        return [
            line
            for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
            for line in differences(a, b, f"{where}/{i}")
        ]
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        same = ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    else:
        same = bool(ours == theirs)
    return [] if same else [f"{where}: {str(ours)[:60]} and {str(theirs)[:60]}"]
