"""The cost of another routing at inference than in training, measured on one text with both."""

from __future__ import annotations

from lightning_moe.analysis.observe import Batch, Observation, observe
from lightning_moe.errors import UserError
from lightning_moe.model import CausalLM
from lightning_moe.routing import Phase


class TrainingRouting:
    """The loss with the routing of training and with causal routing, on the same batches.

    Only full batches without padding count. Experts choose among the tokens of a batch, and capacities bound their
    share of it, so a smaller batch or padding would change the routing.

    Args:
        decoder: decoder; without experts, only the causal loss is measured.
        phase: phase of its training when the checkpoint was written, WARMUP or TRAIN.
        batch_size: number of windows in a full batch.
    """

    def __init__(self, decoder: CausalLM, phase: Phase, batch_size: int) -> None:
        self.decoder, self.phase, self.batch_size = decoder, phase, batch_size
        self.num_tokens = 0
        self._has_experts = next(decoder.moe_layers(), None) is not None
        self._refused = ""
        self._causal_nll = self._nll = 0.0

    def update(self, batch: Batch, seen: Observation) -> None:
        """Add a batch, and what causal routing did with it."""
        if not seen.is_full(self.batch_size):
            return
        self.num_tokens += seen.valid.numel()
        self._causal_nll += float(seen.loss.double().sum())
        if not self._has_experts or self._refused:
            return
        try:
            self._nll += float(observe(self.decoder, batch, self.phase).loss.double().sum())
        except UserError as error:  # a pool that does not divide the batch
            self._refused = str(error)

    @property
    def causal_loss(self) -> float | None:
        """Nats per token; `None` if no batch counted."""
        return self._causal_nll / self.num_tokens if self.num_tokens else None

    @property
    def loss(self) -> float | None:
        """Nats per token, routed as in training; `None` without experts, or if `missing` gives a reason."""
        return self._nll / self.num_tokens if self._has_experts and not self.missing else None

    @property
    def missing(self) -> str:
        """Reason why there is nothing to compare; empty if there is something."""
        if not self.num_tokens:
            return f"the text has no full batch of {self.batch_size} windows to route as in training."
        return self._refused
