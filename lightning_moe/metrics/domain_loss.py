"""The loss of each domain of the text, over any number of tokens and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_moe.metrics.catalogue import domain_parts


class DomainLossMetric(Metric):
    """A metric that sums negative log-likelihood and tokens per domain, and takes their ratio at the end.

    ``compute`` returns ``domain_loss/<domain>``, nats per token, for each domain of which a token was predicted. See
    `domain_parts` for how a domain becomes part of a name.

    Args:
        domains: names of the domains.
    """

    full_state_update = False
    nll: Tensor
    num_tokens: Tensor

    def __init__(self, domains: Sequence[str]) -> None:
        super().__init__()
        self.parts = domain_parts(domains)
        self.add_state("nll", torch.zeros(len(domains), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros(len(domains), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, token_loss: Tensor, domains: Tensor) -> None:
        """Add a batch.

        Args:
            token_loss: fp32 [B, S], nats.
            domains: int64 [B, S], number of the domain of each predicted token; -100 for one that does not count.
        """
        # One masked sum per domain: index_add_ and bincount sum floats in any order on CUDA, and in a product with a
        # one-hot matrix the NaN of one domain would reach all.
        masks = [domains == number for number in range(len(self.parts))]
        loss = token_loss.double()
        # Not in place: a module's ``.to(bfloat16)`` converts the zeros that the sums start from.
        self.nll = self.nll + torch.stack([torch.where(mask, loss, 0.0).sum() for mask in masks])
        self.num_tokens += torch.stack([mask.sum() for mask in masks])

    def compute(self) -> dict[str, Tensor]:
        seen = self.num_tokens.tolist()
        loss = self.nll / self.num_tokens
        return {f"domain_loss/{part}": loss[i].float() for i, part in enumerate(self.parts) if seen[i]}
