"""The switch from expert choice to thresholds in training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.model.moe_layers import named_moe_layers
from lightning_moe.model.routed_layer import RoutedLayer
from lightning_moe.optim.schedule import check_length, steps_of
from lightning_moe.ranks import sum_over_ranks
from lightning_moe.routing.base import Phase

#: number of optimizer steps over which ``auto`` pools what the thresholds would have chosen
WINDOW_STEPS = 20


class ThresholdWarmup(pl.Callback):
    """Trains rules that have a warm-up (`RoutingRule.has_warmup`) in ``Phase.WARMUP`` first, then in ``Phase.TRAIN``.

    During the warm-up, experts choose their top tokens while the moving average of the threshold is tracked. The
    average lags while logits grow fast early on, so thresholds would starve or flood experts if they were used at once.
    The phase is the same for all micro-batches of an optimizer step, is part of the checkpoint, and never goes back.
    Validation and generation always use thresholds.

    With ``auto`` the lag is measured by its effect: the load that the stored thresholds would have given, pooled over
    the global batches of 20 steps, relative to its target. ``routing/warmup_deviation`` is the mean over experts and
    layers of its distance from 1. The switch comes when the last full window is within ``tolerance`` (decision 11).
    In a toy run with decay 0.98 it fell from 1.96 (step 40) over 0.55 (200) and 0.19 (320) to 0.15 (500); switched at
    320, loads stayed 0.2 off for 100 steps, at 500 within 0.1 (docs/routing.md has the tables).

    Args:
        steps: length of the warm-up: a number of optimizer steps (paper: 4,000 of about 20,000), or below 1 a fraction
            of the run. A longer one than the run is refused.
        tokens: length of the warm-up in tokens of the global batch. Give one of the two and leave the other null. If
            both are 0 or null, there is no warm-up.
        auto: whether the switch comes as soon as the measured lag is within ``tolerance``. It comes after ``steps`` or
            ``tokens`` at the latest, unless both are 0 or null.
        tolerance: largest deviation at which ``auto`` switches; 0.1 means loads that are off by a tenth on average.
        min_steps: first step at which ``auto`` may switch. Logits that have not begun to grow show no lag, so it should
            be at least the warm-up of the learning rate.
    """

    def __init__(
        self,
        steps: int | float | None = 0,
        tokens: int | None = None,
        auto: bool = False,
        tolerance: float = 0.1,
        min_steps: int = 100,
    ) -> None:
        if steps and tokens:
            raise UserError(
                f"threshold_warmup.steps={steps} and threshold_warmup.tokens={tokens}: give one, the other null."
            )
        check_length("threshold_warmup.steps", steps or 0)
        for name, value in (("tokens", tokens), ("min_steps", min_steps)):
            if value is not None and value < 0:
                raise UserError(f"threshold_warmup.{name}={value}: must be 0 or more.")
        if not tolerance > 0:
            raise UserError(f"threshold_warmup.tolerance={tolerance}: must be above 0.")
        self.steps, self.tokens = steps or 0, tokens or 0
        self.auto, self.tolerance, self.min_steps = auto, tolerance, min_steps
        self.tokens_seen = 0
        self.switched_at_step: int | None = None
        self.deviation: float | None = None  # of the last full window
        self._window: Tensor | None = None  # fp64 [1 + experts of all layers]: tokens, and those above each threshold
        self._window_steps = 0
        self._local: Tensor | None = None  # the same, of this rank's micro-batches since the last optimizer step
        self._last_steps = 0  # steps of warm-up at most, in this run

    @property
    def phase(self) -> Phase:
        """The phase of the current optimizer step."""
        return Phase.WARMUP if self.switched_at_step is None else Phase.TRAIN

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a warm-up that is longer than the run; one that is as long is said when it ends."""
        if self._window is not None:
            wanted = 1 + sum(layer.state.num_experts for layer in _warming_layers(pl_module)) * self.auto
            if len(self._window) != wanted and self.auto:
                raise UserError(
                    f"the checkpoint's callbacks.ThresholdWarmup.window: has {len(self._window)} "
                    f"numbers; must have {wanted}"
                )
        total = trainer.estimated_stepping_batches
        if not _warming_layers(pl_module) or total == float("inf"):
            self._last_steps = int(self.steps) if self.steps >= 1 else 0
            return
        total = int(total)
        self._last_steps = steps_of(self.steps, total)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._last_steps = min(self._last_steps, total // 2)
            return
        key, earliest = "steps", self._last_steps
        if self.auto and (self.min_steps < self._last_steps or not self._last_steps):
            key, earliest = "min_steps", self.min_steps
        if self.switched_at_step is None and earliest > total and not self.tokens:
            raise UserError(
                f"threshold_warmup.{key}={getattr(self, key)}: the run has {total} optimizer steps, so thresholds "
                f"would never be used; must be at most {total}, and steps may be a fraction of the run, such as 0.2"
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the run ended in its warm-up."""
        if self.switched_at_step is None and _warming_layers(pl_module) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"The threshold warm-up did not end in {trainer.global_step} steps: this model was trained by expert "
                "choice only. See threshold_warmup.steps, tokens and tolerance."
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        layers = _warming_layers(pl_module)
        if self.switched_at_step is None:
            if self._window is not None and self._window_steps == WINDOW_STEPS:
                self.deviation = _load_deviation(layers, self._window)
                self._window, self._window_steps = None, 0
            if self.deviation is not None:
                pl_module.log("routing/warmup_deviation", self.deviation)
            if self._is_over(trainer.global_step):
                self.switched_at_step = trainer.global_step
        for layer in layers:
            layer.train_phase = self.phase

    def _is_over(self, step: int) -> bool:
        if not self.auto:
            return step >= self._last_steps and self.tokens_seen >= self.tokens
        settled = self.deviation is not None and self.deviation <= self.tolerance and step >= self.min_steps
        late = bool(self._last_steps and step >= self._last_steps) or bool(
            self.tokens and self.tokens_seen >= self.tokens
        )
        return settled or late

    @torch.no_grad()
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layers = _warming_layers(pl_module)
        if self.switched_at_step is None and layers and (self.auto or self.tokens):
            counts = _count(layers, with_load=self.auto)
            self._local = counts if self._local is None else self._local + counts

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        local, self._local = self._local, None
        if local is None:
            return
        counts = sum_over_ranks(local)
        if self.tokens:
            self.tokens_seen += int(counts[0])
        if self.auto:
            self._window = counts if self._window is None else self._window.to(counts.device) + counts
            self._window_steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "tokens_seen": self.tokens_seen,
            "switched_at_step": self.switched_at_step,
            "deviation": self.deviation,
            "window": None if self._window is None else self._window.tolist(),
            "window_steps": self._window_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens_seen = state_dict["tokens_seen"]
        self.switched_at_step = state_dict["switched_at_step"]
        self.deviation = state_dict["deviation"]
        window = state_dict["window"]
        self._window = None if window is None else torch.tensor(window, dtype=torch.float64)
        self._window_steps = state_dict["window_steps"]


def _warming_layers(module: pl.LightningModule) -> list[RoutedLayer]:
    return [layer for layer in named_moe_layers(module).values() if layer.rule.has_warmup]


def _count(layers: list[RoutedLayer], with_load: bool) -> Tensor:
    """Count the tokens of the last forward pass, and those above each threshold: fp64 [1 + E of all layers]."""
    counts: list[Tensor] = []
    for layer in layers:
        assert layer.record is not None
        logits = layer.record.logits
        if not counts:
            counts.append(torch.full((1,), logits[..., 0].numel(), dtype=torch.float64, device=logits.device))
        if with_load:
            counts.append(layer.rule.select(logits, layer.state, Phase.CAUSAL).mask.sum((0, 1)).double())
    return torch.cat(counts)


def _load_deviation(layers: list[RoutedLayer], counts: Tensor) -> float:
    """Return the mean over experts and layers of |load / target load − 1|, from pooled counts."""
    tokens, loads = counts[0], counts[1:]
    rates = loads.new_tensor([layer.state.rate for layer in layers for _ in range(layer.state.num_experts)])
    return float((loads / (rates * tokens) - 1).abs().mean())
