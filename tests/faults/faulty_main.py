"""The real command line with one fault in it: ``FAULT='{"point": …, "call": …}' python faulty_main.py fit …``.

What is patched here are the calls around which the fault happens; the program itself knows nothing of faults.
"""

import functools
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from lightning_moe.cli.main import main
from lightning_moe.data.tokenizer import Tokenizer
from lightning_moe.filenames import METRICS_FILE
from lightning_moe.module import LanguageModel
from lightning_moe.optim.muon_adamw import MuonAdamW
from lightning_moe.processes import process_rank
from lightning_moe.tracking.files import LineFile, encode
from lightning_moe.training import run
from lightning_moe.training.checkpoint import RunCheckpoint
from lightning_moe.training.checkpoint_files import PENDING

REACHED, GO_ON = "fault-reached", "go-on"
PATIENCE = 900.0


class Fault:
    """Happens at one call of its point.

    Args:
        point: one of the names in `install`.
        call: at which call of the point, counted from 1.
        effect: ``kill``: SIGKILL to the whole process group, as when a machine goes down; ``die``: to this process
            alone; ``raise``: an exception; ``report``: only the file that says so; ``hold``: the process waits there
            until the file ``go-on`` appears; or the name of a signal that is sent to the group. Always the file
            ``fault-reached`` appears in the working directory.
        rank: rank on which it happens; `None` for all ranks.
    """

    def __init__(self, point: str, call: int = 1, effect: str = "kill", rank: int | None = 0) -> None:
        self.point, self.call, self.effect, self.rank = point, call, effect, rank
        self.calls = 0

    def reached(self, point: str) -> bool:
        if point != self.point or self.rank not in (None, process_rank()):
            return False
        self.calls += 1
        return self.calls == self.call

    def happen(self) -> None:
        Path(REACHED).write_text(f"{os.getpid()}\n")
        if self.effect == "kill":
            os.killpg(0, signal.SIGKILL)
        elif self.effect == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.effect == "raise":
            raise RuntimeError("an error on one rank")
        elif self.effect == "hold":
            deadline = time.monotonic() + PATIENCE
            while not Path(GO_ON).exists() and time.monotonic() < deadline:
                time.sleep(0.05)
        elif self.effect != "report":
            os.killpg(0, signal.Signals[self.effect])
        if self.effect in ("kill", "die"):
            time.sleep(60)  # the signal is on its way

    def before(self, point: str, owner: Any, name: str) -> None:
        """Happen before a call of ``owner.name``."""

        def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self.reached(point):
                self.happen()
            return original(*args, **kwargs)

        wrap(owner, name, call)

    def after(self, point: str, owner: Any, name: str) -> None:
        """Happen after a call of ``owner.name``."""

        def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self.reached(point):
                self.happen()
            return result

        wrap(owner, name, call)


def wrap(owner: Any, name: str, call: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return call(original, *args, **kwargs)

    setattr(owner, name, wrapped)


def install(fault: Fault) -> None:
    fault.before("tokenisation", Tokenizer, "encode_batch")
    fault.before("setup", RunCheckpoint, "on_train_start")
    fault.after("rewind", LineFile, "cut")
    fault.before("between steps", _TrainingEpochLoop, "advance")
    fault.before("before the optimizer", MuonAdamW, "step")
    fault.after("after the optimizer", MuonAdamW, "step")
    fault.before("validation", LanguageModel, "validation_step")
    fault.after("end of validation", LanguageModel, "on_validation_epoch_end")
    fault.after("pending checkpoint", RunCheckpoint, "_write")
    fault.before("summary", run, "summarize")

    def save(original: Callable[..., Any], content: Any, file: Any, **options: Any) -> None:
        if not isinstance(file, io.BytesIO) and fault.reached("half a checkpoint"):
            whole = io.BytesIO()
            original(content, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            fault.happen()
        original(content, file, **options)

    def replace(original: Callable[..., Any], source: Any, target: Any) -> None:
        pending = Path(source).name == PENDING
        if pending and fault.reached("before a checkpoint's name"):
            fault.happen()
        original(source, target)
        if pending and fault.reached("after a checkpoint's name"):
            fault.happen()

    def append(original: Callable[..., Any], file: LineFile, record: dict[str, Any]) -> None:
        metrics = file.path.name == METRICS_FILE
        if metrics and fault.reached("half a line of metrics"):
            line = encode(record)
            os.write(file._fd, line[: len(line) // 2])
            fault.happen()
        original(file, record)
        if metrics and fault.reached("after a line of metrics"):
            fault.happen()

    wrap(torch, "save", save)
    wrap(os, "replace", replace)
    wrap(LineFile, "append", append)


if __name__ == "__main__":
    if os.environ.get("FAULT"):
        install(Fault(**json.loads(os.environ["FAULT"])))
    sys.exit(main())
