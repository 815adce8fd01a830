"""Which keys of a configuration decide what is trained, and how they changed while a run was continued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_moe.config.compose import walk

#: keys that say who runs where and what is shown, not what is trained. The number of processes and the windows of a
#: micro-batch, which decide the routing pools, are recorded apart from these (`Segment`).
NEUTRAL = (
    "seed_everything", "run_name", "output_dir", "ckpt_path", "tracking", "checkpoint", "load_balance", "throughput",
    "data.seed", "data.cache_dir", "data.num_workers", "data.validation_batch_size",
    "model.inference_num_experts_per_token",
    "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.plugins",
    "trainer.accumulate_grad_batches", "trainer.enable_progress_bar", "trainer.enable_model_summary",
    "trainer.log_every_n_steps", "trainer.profiler", "trainer.val_check_interval", "trainer.check_val_every_n_epoch",
    "trainer.num_sanity_val_steps", "trainer.limit_val_batches", "trainer.limit_test_batches",
    "trainer.limit_predict_batches", "trainer.inference_mode", "trainer.detect_anomaly",
)  # fmt: skip

#: Lightning's callbacks that look on; any other one may change the training
OBSERVERS = {
    "LearningRateMonitor", "DeviceStatsMonitor", "ModelCheckpoint", "ModelSummary", "RichModelSummary",
    "RichProgressBar", "TQDMProgressBar", "OnExceptionCheckpoint", "ThroughputMonitor", "Timer",
}  # fmt: skip


@dataclass(frozen=True)
class Segment:
    """A part of a run that was trained with other settings than the part before it.

    Args:
        step: number of optimizer steps done before it.
        changed: dotted key → value before and value in this part.
    """

    step: int
    changed: Mapping[str, Sequence[Any]]


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dotted keys and values that decide what is trained."""

    def is_neutral(key: str) -> bool:
        return any(key == neutral or key.startswith(f"{neutral}.") for neutral in NEUTRAL)

    found = {key: value for key, value in walk(dict(config)) if not isinstance(value, dict) and not is_neutral(key)}
    callbacks = _that_may_train(found.pop("trainer.callbacks", None))
    return found | ({"trainer.callbacks": callbacks} if callbacks else {})


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return each key whose value differs, with both values; `None` stands for a key that is missing."""
    keys = dict.fromkeys([*before, *now])
    return {key: [before.get(key), now.get(key)] for key in keys if before.get(key) != now.get(key)}


def _that_may_train(callbacks: Any) -> list[Any]:
    given = callbacks if isinstance(callbacks, list) else [callbacks]
    return [one for one in given if not (one is None or _class_name(one) in OBSERVERS)]


def _class_name(callback: Any) -> str:
    path = callback.get("class_path", "") if isinstance(callback, Mapping) else callback
    return str(path).rpartition(".")[2]
