"""Learning-rate schedules: a factor on each group's rate, as a function of the optimizer step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_moe.errors import UserError

WARMUPS = ("adamw_warmup_steps", "muon_warmup_steps")
ScheduleKind = Literal["linear", "cosine", "constant_then_decay", "constant"]


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rates change over a run. A step is an optimizer step.

    Args:
        kind: shape after the warm-up: linear or cosine decay to the end of the run; constant_then_decay (constant, then
            a linear decay over the last decay_fraction of the steps); or constant.
        adamw_warmup_steps: length of the linear warm-up of the AdamW groups, in which step i (from 0) has
            (i + 1) / length of the rate: a number of steps, or below 1 a fraction of the run.
        muon_warmup_steps: the same for the Muon groups.
        final_fraction: share of the peak rate at the end of the decay.
        decay_fraction: share of all steps in which constant_then_decay decays.
    """

    kind: ScheduleKind = "linear"
    adamw_warmup_steps: int | float = 250
    muon_warmup_steps: int | float = 0
    final_fraction: float = 0.1
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScheduleKind):
            raise UserError(f"schedule.kind is {self.kind!r}; must be one of {list(get_args(ScheduleKind))}")
        for key in WARMUPS:
            check_length(f"schedule.{key}", getattr(self, key))
        if not 0 <= self.final_fraction <= 1:
            raise UserError(f"schedule.final_fraction is {self.final_fraction}; must be from 0 to 1")
        if not 0 < self.decay_fraction <= 1:
            raise UserError(f"schedule.decay_fraction is {self.decay_fraction}; must be above 0 and at most 1")

    def check(self, total_steps: int) -> None:
        """Raise `UserError` unless warm-ups and final decay fit into the optimizer steps of the run."""
        if total_steps < 1:
            raise UserError(f"the run has {total_steps} optimizer steps; a schedule needs at least 1")
        decay_steps = self.decay_steps(total_steps)
        for key in WARMUPS:
            if self.warmup_steps(key, total_steps) > total_steps - decay_steps:
                decay = f" of which the last {decay_steps} are for the decay" if decay_steps else ""
                raise UserError(
                    f"schedule.{key} is {getattr(self, key)}, but the run has {total_steps} optimizer steps{decay}; "
                    f"must be at most {total_steps - decay_steps}, or a fraction of the run, such as 0.02"
                )

    def cut_to(self, total_steps: int) -> ScheduleConfig:
        """Return the schedule with warm-ups that fit into a run of so many optimizer steps."""
        most = total_steps - self.decay_steps(total_steps)
        adamw, muon = (min(self.warmup_steps(key, total_steps), most) for key in WARMUPS)
        return dataclasses.replace(self, adamw_warmup_steps=adamw, muon_warmup_steps=muon)

    def warmup_steps(self, key: str, total_steps: int) -> int:
        """Return the optimizer steps of a warm-up, ``adamw_warmup_steps`` or ``muon_warmup_steps``."""
        return steps_of(getattr(self, key), total_steps)

    def decay_steps(self, total_steps: int) -> int:
        """Return the optimizer steps of the final decay of ``constant_then_decay``; 0 for the other kinds."""
        return round(self.decay_fraction * total_steps) if self.kind == "constant_then_decay" else 0


def check_length(key: str, length: float) -> None:
    """Refuse what is neither a number of steps nor a fraction of the run."""
    if not 0 <= length < float("inf") or (length >= 1 and length != int(length)):
        raise UserError(
            f"{key} is {length}; must be a whole number of steps from 0, or below 1 a fraction of the run's steps"
        )


def steps_of(length: float, total_steps: int) -> int:
    """Return the number of steps of a length that is given in steps or, below 1, as a fraction of the run."""
    return round(length * total_steps) if length < 1 else int(length)


def learning_rate_factor(step: int, config: ScheduleConfig, warmup_steps: int, total_steps: int) -> float:
    """Return the factor on the peak rate for optimizer step ``step`` (from 0); steps past the end keep the last one."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if config.kind == "constant":
        return 1.0
    decay_start = warmup_steps
    if config.kind == "constant_then_decay":
        decay_start = total_steps - config.decay_steps(total_steps)
    if step < decay_start:
        return 1.0
    progress = (step - decay_start) / (total_steps - decay_start) if step < total_steps else 1.0
    remaining = (1 + math.cos(math.pi * progress)) / 2 if config.kind == "cosine" else 1 - progress
    return config.final_fraction + (1 - config.final_fraction) * remaining


def build_schedule(optimizer: Optimizer, config: ScheduleConfig, total_steps: int) -> LambdaLR:
    """Build a scheduler that is stepped once per optimizer step.

    Args:
        optimizer: the optimizer. Groups of rule ``muon`` take ``muon_warmup_steps``, all others
            ``adamw_warmup_steps``.
        config: the schedule.
        total_steps: optimizer steps of the whole run, those before a resume included.

    Raises:
        UserError: the warm-up (and the final decay) do not fit into ``total_steps``.
    """
    config.check(total_steps)
    factors: list[Callable[[int], float]] = []
    for group in optimizer.param_groups:
        key = "muon_warmup_steps" if group.get("rule") == "muon" else "adamw_warmup_steps"
        steps = config.warmup_steps(key, total_steps)
        factors.append(
            functools.partial(learning_rate_factor, config=config, warmup_steps=steps, total_steps=total_steps)
        )
    return LambdaLR(optimizer, factors)


def use_settings(optimizer: Optimizer, scheduler: LambdaLR, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Give the parameter groups these settings, after a checkpoint has brought back those it was trained with.

    Args:
        optimizer: the optimizer.
        scheduler: its scheduler, at the step that comes next.
        groups: settings of each group, without its parameters; ``initial_lr`` is the peak rate.

    Returns:
        Name of each group whose rate in the next step is another one → that of the checkpoint, and the new one.
    """
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    differing: dict[str, Any] = {}
    for group, wanted, peak, factor in zip(
        optimizer.param_groups, groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        before, now = group["lr"], peak * factor(scheduler.last_epoch)
        group.update({**wanted, "lr": now})
        if now != before:
            differing[str(wanted.get("name", len(differing)))] = (before, now)
    return differing
