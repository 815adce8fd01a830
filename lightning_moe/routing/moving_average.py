"""Smoothing of a pooled statistic over optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.routing.base import RoutingState


@dataclass(frozen=True)
class MovingAverage:
    """Bias-corrected exponential moving average, a mixin for rules.

    After n updates by values x with decays β, which may differ, the average is Σ wᵢ xᵢ / Σ wᵢ with
    wᵢ = (1 − βᵢ) · βᵢ₊₁ ⋯ βₙ. This is Adam's bias-corrected average: for a constant decay the denominator
    Σ wᵢ = 1 − β₁ ⋯ βₙ is 1 − βⁿ. The state buffer ``ema_weight`` fp32 [] holds it, at first 0. An update is

        weight  ← β · weight + (1 − β)
        average ← average + (1 − β) / weight · (x − average)

    so the first update replaces the initial value, and β = 0 keeps the last value exactly.

    Args:
        ema_decay: decay β per optimizer step; its memory is 1/(1−β) steps, and 0 has none. The default suits runs of
            some hundred steps (the paper: 0.999 over 20,000).
        ema_half_life_tokens: tokens after which a value's weight has halved, β = 0.5 ^ (tokens of the global batch /
            half life): the same memory whatever the batch size. Null takes ema_decay instead.
    """

    ema_decay: float = 0.95
    ema_half_life_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"model.routing.ema_decay={self.ema_decay!r}: must be at least 0 and below 1.")
        if self.ema_half_life_tokens is None:
            return
        if not self.ema_half_life_tokens > 0:
            raise UserError(
                f"model.routing.ema_half_life_tokens={self.ema_half_life_tokens!r}: must be above 0, or null."
            )
        default = next(field.default for field in fields(self) if field.name == "ema_decay")
        if self.ema_decay != default:
            raise UserError(
                f"model.routing.ema_decay={self.ema_decay!r} and ema_half_life_tokens={self.ema_half_life_tokens!r}: "
                f"give one of the two (ema_decay: {default} or ema_half_life_tokens: null)."
            )

    def initial_average(self) -> Mapping[str, Tensor]:
        """Return the state buffer that the average needs beside its value."""
        return {"ema_weight": torch.zeros((), dtype=torch.float32)}

    def decay(self, num_tokens: Tensor) -> Tensor | float:
        """Return β of an update by a global batch of ``num_tokens`` int64 []: a number, or a tensor fp64 []."""
        if self.ema_half_life_tokens is None:
            return self.ema_decay
        return torch.exp2(-num_tokens.double() / self.ema_half_life_tokens)

    def memory(self, num_tokens: int) -> float:
        """Return how many tokens the average covers, N / (1 − β), for N = ``num_tokens`` in a global batch."""
        return num_tokens / (1 - float(self.decay(torch.tensor(num_tokens))))

    def average(self, state: RoutingState, num_tokens: Tensor, **values: Tensor) -> None:
        """Update the averages ``state[name]`` fp32 with ``values`` of the same shapes, once per optimizer step."""
        new = 1 - self.decay(num_tokens)
        weight = (1 - new) * state["ema_weight"].double() + new
        state["ema_weight"].copy_(weight)
        for name, value in values.items():
            state[name].lerp_(value, (new / weight).float())
