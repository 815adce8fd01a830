"""The sweep that the tests run, with a stand-in for ``fit``."""

import contextlib
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

import lightning_moe.sweep.configuration  # noqa: F401 - once, and not again in every process that is forked
from lightning_moe.sweep.main import run_sweep
from lightning_moe.sweep.pool import RUN_FOLDER_VARIABLE
from lightning_moe.sweep.spec import Sweep

FORK = multiprocessing.get_context("fork")

STAND_IN = (sys.executable, str(Path(__file__).with_name("stand_in_fit.py")))
DECAY = "model.routing.init_args.ema_decay"
RATE = "model.optimizer.adamw_lr"
CONTENT: dict[str, Any] = {
    "name": "study",
    "config": [{"tracking.enabled": False, "trainer.max_steps": 3}],
    "space": {DECAY: {"float": [0.5, 0.99]}},
    "objectives": {"val/loss": "minimize"},
    "sampler": {"name": "RandomSampler", "seed": 1},
    "budget": {"trials": 3},
}

#: changes to CONTENT → the sweep
Make = Callable[..., Sweep]


def start_process(sweep: Sweep, workers: int = 1) -> Any:
    """Start the sweep in a process of its own."""
    process = FORK.Process(target=run_sweep, args=(sweep, workers), daemon=True)
    process.start()
    return process


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait, two minutes at most."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def processes_of(folder: Path) -> list[int]:
    """Processes that a sweep started for the runs in its folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(RUN_FOLDER_VARIABLE, "").startswith(str(folder.absolute())):
                found.append(process.pid)
    return found
