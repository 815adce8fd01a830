"""Plain decoder parts: normalisation, rotary embedding, attention with a key/value cache, feed-forward network.

Shape letters: B sequences, S new tokens, T tokens in the cache and new, D hidden size, H query heads, G key/value
heads, K head size, F hidden size of the feed-forward network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moe.model.config import Activation, DecoderConfig
from lightning_moe.model.initialise import init_matrix, initialise


class RMSNorm(nn.Module):
    """The norm x / rms(x) over the last dimension, without a learned scale."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.rms_norm(x, x.shape[-1:], eps=self.eps)
        return out


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin, fp32 [S, K/2], of the rotary embedding for integer ``positions`` [S]."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[:, None] * theta**-exponents
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotation to the halves of each head of ``x`` [B, heads, S, K]; the dtype of ``x`` stays."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


@dataclass
class LayerCache:
    """Keys and values [B, G, max, K] of one layer; the first ``length`` positions are filled."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new [B, G, S, K] entries and return all filled ones [B, G, T, K]."""
        start, self.length = self.length, self.length + keys.shape[2]
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class Attention(nn.Module):
    """Causal self-attention with rotary positions, query/key normalisation and optional grouped key/value heads."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.key_value_heads
        self.head_dim = config.head_dim
        d, kv = config.hidden_size, self.num_key_value_heads * self.head_dim
        self.query = nn.Linear(d, d, bias=False)
        self.key = nn.Linear(d, kv, bias=False)
        self.value = nn.Linear(d, kv, bias=False)
        self.output = nn.Linear(d, d, bias=False)
        self.norm = RMSNorm(config.norm_eps)
        initialise(self)

    def reset_parameters(self) -> None:
        """Set the initial weights of the paper; the output projection starts at zero."""
        for linear in (self.query, self.key, self.value):
            init_matrix(linear.weight, linear.in_features, linear.out_features)
        nn.init.zeros_(self.output.weight)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: LayerCache | None = None) -> Tensor:
        """Map ``x`` [B, S, D] to [B, S, D]; with a cache, ``x`` continues what the cache holds."""
        batch, length, _ = x.shape
        query = self._heads(self.query(x), self.num_heads)
        key = self._heads(self.key(x), self.num_key_value_heads)
        value = self._heads(self.value(x), self.num_key_value_heads)
        query, key = apply_rotary(self.norm(query), *rotary), apply_rotary(self.norm(key), *rotary)
        query, key = query.to(value.dtype), key.to(value.dtype)
        mask = None
        if cache is not None:
            key, value = cache.append(key, value)
            total = key.shape[2]
            if 1 < length < total:  # several new tokens after filled ones: token s sees T - S + s + 1 entries
                mask = torch.ones(length, total, dtype=torch.bool, device=x.device).tril(total - length)
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and length > 1,
            enable_gqa=self.num_heads != self.num_key_value_heads,
        )
        projected: Tensor = self.output(out.transpose(1, 2).reshape(batch, length, -1))
        return projected

    def _heads(self, x: Tensor, num_heads: int) -> Tensor:
        return x.view(*x.shape[:-1], num_heads, self.head_dim).transpose(1, 2)


def activate(up: Tensor, gate: Tensor | None) -> Tensor:
    """Compute the hidden activation: ReLU² of ``up``, or SiLU(gate) · up if a gate is given (SwiGLU)."""
    if gate is None:
        hidden = torch.relu(up)
        return hidden * hidden  # as a power, CUDA's autocast would compute it in fp32
    return F.silu(gate) * up


class FeedForward(nn.Module):
    """Dense feed-forward network D → F → D; also the shared expert (several shared experts are one wider network)."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: Activation) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False) if activation == "swiglu" else None
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)
        initialise(self)

    def reset_parameters(self) -> None:
        """Set the initial weights of the paper; the down projection starts at zero."""
        for linear in (self.up, self.gate):
            if linear is not None:
                init_matrix(linear.weight, linear.in_features, linear.out_features)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(activate(self.up(x), None if self.gate is None else self.gate(x)))
        return out
