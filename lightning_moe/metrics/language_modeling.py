"""Loss, perplexity and bits per byte over any number of tokens and ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class LanguageModelingMetric(Metric):
    """A metric that sums negative log-likelihood, tokens and bytes, and takes their ratios at the end.

    ``compute`` returns ``loss`` (nats per token), ``perplexity`` and, if byte counts were given, ``bits_per_byte``. The
    latter is the whole negative log-likelihood (that of document separators included, which hold no bytes) over the
    bytes of text.
    """

    full_state_update = False
    nll: Tensor
    num_tokens: Tensor
    num_bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, token_loss: Tensor, labels: Tensor, token_bytes: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            token_loss: fp32 [B, S], nats; 0 where the label is -100.
            labels: int64 [B, S].
            token_bytes: int64 [vocabulary], bytes of text per token.
        """
        valid = labels != -100
        # Not in place: a module's ``.to(bfloat16)`` converts the zero that the sum starts from.
        self.nll = self.nll.double() + token_loss.double().sum()
        self.num_tokens += valid.sum()
        if token_bytes is not None:
            self.num_bytes += token_bytes[labels[valid]].sum()

    def compute(self) -> dict[str, Tensor]:
        loss = self.nll / self.num_tokens
        values = {"loss": loss, "perplexity": loss.exp()}
        if self.num_bytes > 0:
            values["bits_per_byte"] = self.nll / math.log(2) / self.num_bytes
        return {name: value.float() for name, value in values.items()}
