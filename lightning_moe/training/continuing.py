"""Continuing a run with other settings: what is refused, and what is applied, said and recorded.

A checkpoint holds the configuration that it was trained with, so each continuation knows what it changes, whichever
checkpoint of whichever run it starts from. Every key is one of three kinds:

* refused: it has done its work when a run is continued (`check`), or the checkpoint is of other data or another
  architecture (`TextDataModule.load_state_dict`, `LanguageModel.on_load_checkpoint`);
* neutral: it decides nothing about training (`config.settings.NEUTRAL`);
* applied from this step on: all others. What changed is printed, and it is a `Segment` of the run's record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from lightning_moe.config.settings import Segment, changes, settings
from lightning_moe.errors import UserError
from lightning_moe.report.tables import shown
from lightning_moe.runs.config import parse_config

#: key of the record in a checkpoint
RECORD = "run"
#: keys that have an effect only at the beginning of a run
AT_THE_BEGINNING = ("seed_everything", "model.init_from")


@dataclass(frozen=True)
class Trained:
    """How the parameters of a checkpoint were trained, as the checkpoint records it.

    Args:
        step: number of optimizer steps.
        config: complete configuration of the last part.
        layout: ``world_size``, the number of processes, and ``micro_batch_size``, the windows that one routes together.
        segments: parts of the run that had other settings than the part before.
        warmup_ended: optimizer step at which the threshold warm-up ended; `None` during the warm-up.
    """

    step: int
    config: Mapping[str, Any]
    layout: Mapping[str, int]
    segments: tuple[Segment, ...]
    warmup_ended: int | None

    @classmethod
    def of_checkpoint(cls, content: Mapping[str, Any], where: str) -> Trained | None:
        """Read the record; `None` for a checkpoint that holds none (one written from Python, or an export).

        Args:
            content: content of the checkpoint, as `read_header` returns it.
            where: path of the checkpoint, for messages.

        Raises:
            UserError: the configuration in it is none.
        """
        record = content.get(RECORD)
        if record is None:
            return None
        warmup = content.get("callbacks", {}).get("ThresholdWarmup", {})
        return cls(
            content["global_step"],
            parse_config(record["config"], f"{where}: run.config"),
            record["layout"],
            tuple(Segment(segment["step"], segment["changed"]) for segment in record["segments"]),
            warmup.get("switched_at_step"),
        )


def to_checkpoint(config: str, layout: Mapping[str, int], segments: tuple[Segment, ...]) -> dict[str, Any]:
    """Return the record that `Trained.of_checkpoint` reads."""
    return {"config": config, "layout": dict(layout), "segments": [asdict(segment) for segment in segments]}


def check(trained: Trained | None, config: str) -> None:
    """Refuse a configuration that a checkpoint cannot be continued with.

    Args:
        trained: record of the checkpoint; `None` for a new run, or without a record.
        config: complete configuration of the continuation, YAML.

    Raises:
        UserError: a key that works only at the beginning of a run differs, or the run would end before the checkpoint.
    """
    if trained is None:
        return
    configs = trained.config, yaml.safe_load(config)
    before, now = ({**settings(one), "seed_everything": one["seed_everything"]} for one in configs)
    for key, (old, new) in changes(before, now).items():
        if key in AT_THE_BEGINNING:
            raise UserError(
                f"{key}={shown(new)}: it has an effect only at the beginning of a run, and this one began with "
                f"{shown(old)}; leave it out to continue, or start a run of its own"
            )
        if key.startswith("threshold_warmup.") and trained.warmup_ended is not None:
            raise UserError(
                f"{key}={shown(new)}: the threshold warm-up of this run ended at step {trained.warmup_ended} (with "
                f"{shown(old)}); leave it out to continue, or start a run of its own"
            )
    max_steps = configs[1]["trainer"]["max_steps"]
    if 0 <= max_steps < trained.step:
        raise UserError(
            f"trainer.max_steps={max_steps}: the checkpoint has {trained.step} optimizer steps; must be at least that"
        )


def segments(trained: Trained | None, config: str, layout: Mapping[str, int]) -> tuple[Segment, ...]:
    """Return the parts of the run with other settings, up to the one that begins now."""
    if trained is None:
        return ()
    changed = changes({**settings(trained.config), **trained.layout}, {**settings(yaml.safe_load(config)), **layout})
    return (*trained.segments, Segment(trained.step, changed)) if changed else trained.segments


def sentence(segment: Segment) -> str:
    """Say what a segment changes, in one line."""
    each = "; ".join(f"{key}: {shown(old)} → {shown(new)}" for key, (old, new) in segment.changed.items())
    return f"Continuing from step {segment.step} with other settings: {each}"
