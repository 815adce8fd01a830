"""What every causal language model of this package has: our own decoder, and a released model with our routing."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moe.model.routed_layer import RoutedLayer


@dataclass
class DecoderOutput:
    """Result of a forward pass.

    Args:
        logits: fp32 [B, S, V], soft-capped.
        aux_loss: sum over layers of the rule's auxiliary losses, or `None`.
    """

    logits: Tensor
    aux_loss: Tensor | None


@dataclass
class DecoderLoss:
    """Result of a forward pass with labels.

    Args:
        loss: mean of ``token_loss`` over all positions, fp32 [], with a gradient.
        token_loss: cross-entropy of each position in nats, fp32 [B, S], without a gradient; 0 where the label is -100.
        aux_loss: as in `DecoderOutput`; not part of ``loss``.
        predicted: token with the highest logit at each position, int64 [B, S], -100 where the label is; `None` unless
            the model `predicts`.
    """

    loss: Tensor
    token_loss: Tensor
    aux_loss: Tensor | None
    predicted: Tensor | None = None


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a decoder, and FLOPs of one training token.

    Args:
        total_parameters: number of all parameters; a tied matrix counts once.
        active_parameters: number of those that one token uses at the target rate: of the routed experts the share
            ``num_experts_per_token / num_experts``, everything else in full (embedding and head included).
        flops_per_token: FLOPs of one training token (forward + backward) on active parameters: 6 per active matrix
            weight (the embedding look-up is none) + 6 · layers · hidden_size · max_sequence_length for causal
            attention scores and values (the mean context is half the window).
    """

    total_parameters: int
    active_parameters: int
    flops_per_token: int


class CausalLM(nn.Module):
    """Base of the models that the commands run: token ids in, logits or losses out, MoE layers that route by a rule.

    Attributes:
        predicts: whether a pass with labels and without gradients also returns `DecoderLoss.predicted`, which costs
            another look at all logits. A model may ignore it.
        compiled: whether ``torch.compile`` compiles its blocks.
    """

    predicts = False
    compiled = False

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number V of tokens."""

    @property
    @abstractmethod
    def max_sequence_length(self) -> int:
        """Largest number of tokens of context."""

    @property
    @abstractmethod
    def size(self) -> ModelSize:
        """Parameters, and FLOPs of a training token."""

    @abstractmethod
    def new_cache(self, batch_size: int, length: int | None = None) -> Any:
        """Return an empty key/value cache for `forward`, in the dtype that attention computes in.

        Args:
            batch_size: number of rows.
            length: number of positions that it has room for; `None` means ``max_sequence_length``.
        """

    @abstractmethod
    def forward(
        self, input_ids: Tensor, cache: Any = None, last_only: bool = False, labels: Tensor | None = None
    ) -> DecoderOutput | DecoderLoss:
        """Compute the logits of the next token at every position, or with ``labels`` their loss.

        Args:
            input_ids: int64 [B, S].
            cache: cache from `new_cache`; ``input_ids`` then continue what it holds, and it grows by S.
            last_only: whether only the logits [B, 1, V] of the last position are computed; not with ``labels``.
            labels: int64 [B, S], already shifted: ``labels[b, s]`` follows ``input_ids[b, s]``; -100 does not count.

        Returns:
            A `DecoderOutput`, or a `DecoderLoss` if there are labels.
        """

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def num_experts(self) -> int:
        """Routed experts of each MoE layer; 0 for a dense model."""
        return next((layer.state.num_experts for layer in self.moe_layers()), 0)

    def moe_layers(self) -> Iterator[RoutedLayer]:
        """Return the MoE layers from bottom to top."""
        return (module for module in self.modules() if isinstance(module, RoutedLayer))
