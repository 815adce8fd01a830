"""The sweep that the tests run, with a stand-in for ``fit``."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_moe.sweep.spec import Sweep

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
