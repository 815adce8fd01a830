"""The losses of an optimizer step, over all its micro-batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moe.hf.healing import HealingLoss
from lightning_moe.model import DecoderLoss
from lightning_moe.ranks import sum_over_ranks, world_size


class StepLosses:
    """Collects what the micro-batches of an optimizer step lose, under the names that are logged."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}

    def add(self, output: DecoderLoss) -> Tensor:
        """Keep the losses of a micro-batch, and return their sum, with a gradient: the loss to train on."""
        loss = output.loss
        if isinstance(output, HealingLoss) and output.distillation is not None:
            self._keep("loss", output.token_loss.mean())
            self._keep("distillation_loss", output.distillation)
        else:
            self._keep("loss", loss)
        if output.aux_loss is not None:
            self._keep("aux_loss", output.aux_loss)
            loss = loss + output.aux_loss
        return loss

    def _keep(self, name: str, value: Tensor) -> None:
        self._values.setdefault(name, []).append(value.detach())

    def take(self) -> dict[str, Tensor]:
        """Return the means since the last call, over all micro-batches and ranks. Collective."""
        values, self._values = self._values, {}
        if not values:
            return {}
        # Without Lightning's sync_dist and prog_bar: in each step, one has a barrier, the other reads the number.
        local = torch.stack([torch.stack(each).mean() for each in values.values()])
        return dict(zip(values, sum_over_ranks(local) / world_size(), strict=True))
