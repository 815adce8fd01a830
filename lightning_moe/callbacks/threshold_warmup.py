"""The switch from expert choice to thresholds in training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from lightning_moe.callbacks.layers import named_moe_layers, sum_over_ranks
from lightning_moe.errors import UserError
from lightning_moe.routing.base import Phase


class ThresholdWarmup(pl.Callback):
    """Trains rules that have a warm-up (`RoutingRule.has_warmup`) in ``Phase.WARMUP`` first, then in ``Phase.TRAIN``.

    During the warm-up experts choose their top tokens while the threshold's EMA is tracked; it lags behind logits that
    grow fast early on, so thresholds used at once would starve or flood experts. The phase is the same for all
    micro-batches of an optimizer step, is part of the checkpoint, and never goes back. Validation and generation use
    thresholds throughout.

    Args:
        steps: optimizer steps of warm-up (paper: 4,000 of about 20,000).
        tokens: the same in tokens of the global batch; give one of the two, the other null. Both 0 or null: no warm-up.
    """

    def __init__(self, steps: int | None = 0, tokens: int | None = None) -> None:
        if steps and tokens:
            raise UserError(
                f"threshold_warmup.steps={steps} and threshold_warmup.tokens={tokens}: give one, the other null."
            )
        for name, value in (("steps", steps), ("tokens", tokens)):
            if value is not None and value < 0:
                raise UserError(f"threshold_warmup.{name}={value}: must be 0 or more.")
        self.steps, self.tokens = steps or 0, tokens or 0
        self.tokens_seen = 0
        self.switched_at_step: int | None = None
        self._micro_batch_tokens = 0

    @property
    def phase(self) -> Phase:
        """The phase of the current optimizer step."""
        return Phase.WARMUP if self.switched_at_step is None else Phase.TRAIN

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.switched_at_step is None and trainer.global_step >= self.steps and self.tokens_seen >= self.tokens:
            self.switched_at_step = trainer.global_step
        for layer in named_moe_layers(pl_module).values():
            layer.train_phase = self.phase if layer.rule.has_warmup else Phase.TRAIN

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        record = next((layer.record for layer in named_moe_layers(pl_module).values()), None)
        if record is not None:
            self._micro_batch_tokens += record.logits[..., 0].numel()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.tokens and self.switched_at_step is None:
            self.tokens_seen += int(sum_over_ranks(torch.tensor(self._micro_batch_tokens, device=pl_module.device)))
        self._micro_batch_tokens = 0

    def state_dict(self) -> dict[str, Any]:
        return {"tokens_seen": self.tokens_seen, "switched_at_step": self.switched_at_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens_seen = state_dict["tokens_seen"]
        self.switched_at_step = state_dict["switched_at_step"]
