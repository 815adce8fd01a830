"""The decoder's architecture as one dataclass, without its routing and its optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lightning_moe.errors import UserError

Activation = Literal["relu2", "swiglu"]
Gate = Literal["sigmoid", "softmax"]
RouterKind = Literal["linear", "cosine"]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of the decoder; the defaults are the ``tiny`` model of the quickstart.

    The dense model, and every routing rule, of one config have the same active FLOPs by construction: a dense
    feed-forward network has hidden size ``(num_shared_experts + num_experts_per_token) * expert_hidden_size``.

    Args:
        vocab_size: number of token ids; linked to ``data.vocab_size`` on the command line.
        max_sequence_length: longest context in tokens; linked to ``data.sequence_length``.
        hidden_size: width of the residual stream (paper: 64 × layers).
        num_layers: number of blocks.
        num_attention_heads: query heads; ``hidden_size`` must be a multiple.
        num_key_value_heads: key/value heads of grouped-query attention; null means one per query head.
        num_experts: routed experts per MoE layer.
        num_experts_per_token: mean number of routed experts per token: one value for every layer, or one per MoE layer.
            It may be fractional for rules that choose tokens (the target rate is this / num_experts).
        num_shared_experts: experts that every token passes, beside the routed ones (0 removes the shared path).
        expert_hidden_size: hidden size of one expert; null means 2 × hidden_size (paper).
        num_dense_layers: number of first layers that keep a dense feed-forward network (paper: 1).
        dense_hidden_size: hidden size of the dense networks; null means the active FLOPs of shared + routed experts.
        activation: ``relu2`` (ReLU², paper) or ``swiglu``; SwiGLU experts have three matrices instead of two.
        gate: weight of a chosen expert's output: ``sigmoid`` of its logit (paper), or its ``softmax`` probability over
            all experts (token choice only: it makes a token's gates depend on each other).
        normalize_gates: whether the gates of a token's chosen experts are divided by their sum (off in the paper: 0.04
            worse).
        router: ``linear`` (logit = w·x) or ``cosine`` (scaled cosine similarity to a learned prototype).
        router_z_loss_coef: coefficient of the router z-loss, added to the loss of every MoE layer under any rule: mean
            over tokens of logsumexp(r)² (ST-MoE, arXiv 2202.08906: 0.001), which keeps router logits small.
        tie_embeddings: whether the embedding and the head share one matrix.
        logit_softcap: bound c of the output logits, which become c·tanh(x/c), in fp32; null switches it off.
        rope_theta: base of the rotary position embedding.
        norm_eps: epsilon inside every RMSNorm.
        activation_checkpointing: whether the backward pass recomputes each block instead of keeping its activations.
    """

    vocab_size: int = 4096
    max_sequence_length: int = 256
    hidden_size: int = 128
    num_layers: int = 4
    num_attention_heads: int = 2
    num_key_value_heads: int | None = None
    num_experts: int = 16
    num_experts_per_token: float | list[float] = 1
    num_shared_experts: int = 1
    expert_hidden_size: int | None = None
    num_dense_layers: int = 1
    dense_hidden_size: int | None = None
    activation: Activation = "relu2"
    gate: Gate = "sigmoid"
    normalize_gates: bool = False
    router: RouterKind = "linear"
    router_z_loss_coef: float = 0.0
    tie_embeddings: bool = False
    logit_softcap: float | None = 15.0
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "max_sequence_length",
            "hidden_size",
            "num_layers",
            "num_attention_heads",
            "num_experts",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("num_shared_experts", "num_dense_layers", "router_z_loss_coef"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require(
            "num_attention_heads",
            self.hidden_size % self.num_attention_heads == 0 and self.head_dim % 2 == 0,
            f"a divisor of hidden_size={self.hidden_size} that leaves an even head size (rotary embedding)",
        )
        self._require(
            "num_key_value_heads",
            self.key_value_heads >= 1 and self.num_attention_heads % self.key_value_heads == 0,
            f"a divisor of num_attention_heads={self.num_attention_heads}",
        )
        self._require("expert_hidden_size", self.expert_size >= 1, "at least 1")
        self._require("dense_hidden_size", self.dense_hidden_size is None or self.dense_hidden_size >= 1, "at least 1")
        if isinstance(self.num_experts_per_token, list):
            self._require(
                "num_experts_per_token",
                0 < len(self.num_experts_per_token) == self.num_moe_layers,
                f"one number, or one for each of the {self.num_moe_layers} MoE layers",
            )
        for value in self.rates_per_layer:
            self._require(
                "num_experts_per_token",
                0 < value <= self.num_experts,
                f"above 0 and at most num_experts={self.num_experts}",
            )
        for name, choices in (("activation", Activation), ("gate", Gate), ("router", RouterKind)):
            self._require(name, getattr(self, name) in get_args(choices), f"one of {', '.join(get_args(choices))}")
        self._require("logit_softcap", self.logit_softcap is None or self.logit_softcap > 0, "above 0, or null")

    def _require(self, name: str, ok: bool, right: str) -> None:
        if not ok:
            raise UserError(f"model.decoder.{name}={getattr(self, name)!r}: must be {right}.")

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """Number of key/value heads with the default resolved."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def expert_size(self) -> int:
        """Hidden size of one expert with the default resolved."""
        return 2 * self.hidden_size if self.expert_hidden_size is None else self.expert_hidden_size

    @property
    def num_moe_layers(self) -> int:
        """Number of layers after the dense first ones."""
        return max(0, self.num_layers - self.num_dense_layers)

    @property
    def rates_per_layer(self) -> list[float]:
        """``num_experts_per_token`` of every layer; dense first layers have that of the first MoE layer."""
        value = self.num_experts_per_token
        if not isinstance(value, list):
            return [value] * self.num_layers
        return [value[max(0, layer - self.num_dense_layers)] for layer in range(self.num_layers)]

    def dense_size(self, num_experts_per_token: float) -> int:
        """Return the hidden size of a dense network; the default gives the active FLOPs of shared + routed experts."""
        if self.dense_hidden_size is not None:
            return self.dense_hidden_size
        return round((self.num_shared_experts + num_experts_per_token) * self.expert_size)
