"""The products of the routed experts, as two custom operations.

``torch.compile`` takes each operation as it is: the number of chosen pairs may differ from pass to pass without another
graph, and rows of padding (`model.pairs`) need no care in generated code.

Beside the inputs, the backward pass needs one tensor [M, F] per up-projection. The activation and the sorted tokens are
cheaper to make again than to keep, and the experts' outputs are never needed: the gradient of a pair's gate is
⟨dy_t, expert_i(x_t)⟩ = ⟨dy_t · downᵀ_i, hidden activation⟩, whose left side the backward pass has anyway.

Shape letters: N tokens, E experts, M chosen token-expert pairs, D hidden size, F hidden size of an expert. A local name
that ends in such letters has that shape: ``rows_MD``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_moe.model.pairs import Pairs
from lightning_moe.model.token_sum import sum_per_token


def routed_experts(x: Tensor, gates: Tensor, pairs: Pairs, up: Tensor, gate: Tensor | None, down: Tensor) -> Tensor:
    """Apply each pair's expert to its token, and sum the weighted outputs per token.

    The result is differentiable in all floating arguments, and a weight's gradient has the dtype of the weight.

    Args:
        x: tokens [N, D]; products are computed in its dtype.
        gates: weight of each pair, fp32 [M]; that of padding is not read, and gets a gradient of zero.
        pairs: the pairs, see `model.pairs`.
        up: weights [E, D, F] of any dtype.
        gate: gate weights [E, D, F] of SwiGLU experts; `None` for ReLU².
        down: weights [E, F, D].

    Returns:
        [N, D] in the dtype of ``x``.
    """
    run = _forward if _without_operations() else _forward_op
    y: Tensor = run(x, gates, *pairs[1:], up, gate, down)[0]
    return y


def _without_operations() -> bool:
    """Return whether no gradient and no graph is wanted; torch's dispatcher would then cost more than one token."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def _forward(
    x: Tensor,
    gates: Tensor,
    token: Tensor,
    offsets: Tensor,
    by_token: Tensor,
    token_ends: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [N, D], and for the backward pass the up-projections [M, F] (the second empty without ``gate``)."""
    rows_MD = x.index_select(0, token)
    hidden_MF = grouped_product(rows_MD, up, offsets)
    hidden_gate_MF = None if gate is None else grouped_product(rows_MD, gate, offsets)
    out_MD = grouped_product(_activate(hidden_MF, hidden_gate_MF), down, offsets)
    y_ND = sum_per_token(out_MD, by_token, token_ends, gates)
    return y_ND, hidden_MF, x.new_empty(0) if hidden_gate_MF is None else hidden_gate_MF


_forward_op = torch.library.custom_op("lightning_moe::routed_experts", _forward, mutates_args=())


@_forward_op.register_fake
def _(
    x: Tensor,
    gates: Tensor,
    token: Tensor,
    offsets: Tensor,
    by_token: Tensor,
    token_ends: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = x.new_empty(token.shape[0], up.shape[2])
    return torch.empty_like(x), hidden, x.new_empty(0) if gate is None else torch.empty_like(hidden)


@torch.library.custom_op("lightning_moe::routed_experts_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    gates: Tensor,
    token: Tensor,
    offsets: Tensor,
    by_token: Tensor,
    token_ends: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    hidden: Tensor,
    hidden_gate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, gates, up, gate (empty without one) and down."""
    d_rows_MD = dy.index_select(0, token)
    weights_M1 = gates.to(x.dtype).unsqueeze(-1)  # a product of two dtypes is several times slower
    d_activated_MF = grouped_product(d_rows_MD, down.mT, offsets)  # before the gate, whose gradient it gives
    activated_MF = _activate(hidden, None if gate is None else hidden_gate)
    d_down_EFD = grouped_outer(activated_MF, d_rows_MD.mul_(weights_M1), offsets, down.dtype)
    del d_rows_MD  # here and below: make room for the weights' gradients
    d_gates_M = activated_MF.mul_(d_activated_MF).sum(-1, dtype=gates.dtype)
    is_pair_M = torch.arange(gates.shape[0], device=gates.device) < offsets[-1]
    d_gates_M = torch.where(is_pair_M, d_gates_M, 0)  # padding may hold NaN, which no product with zero removes
    del activated_MF
    if gate is None:  # of relu(h)²
        d_hidden_MF, d_gate_EDF = d_activated_MF.mul_(hidden.relu().mul_(2 * weights_M1)), x.new_empty(0)
        d_sorted_MD = grouped_product(d_hidden_MF, up.mT, offsets)
    else:  # of silu(g) · h
        d_activated_MF.mul_(weights_M1)
        d_hidden_gate_MF = torch.ops.aten.silu_backward(d_activated_MF * hidden, hidden_gate)
        d_hidden_MF = d_activated_MF.mul_(F.silu(hidden_gate))
        d_sorted_MD = grouped_product(d_hidden_MF, up.mT, offsets) + grouped_product(d_hidden_gate_MF, gate.mT, offsets)
    d_x_ND = sum_per_token(d_sorted_MD, by_token, token_ends)
    del d_sorted_MD
    rows_MD = x.index_select(0, token)
    if gate is not None:
        d_gate_EDF = grouped_outer(rows_MD, d_hidden_gate_MF, offsets, gate.dtype)
        del d_hidden_gate_MF
    d_up_EDF = grouped_outer(rows_MD, d_hidden_MF, offsets, up.dtype)
    return d_x_ND, d_gates_M, d_up_EDF, d_gate_EDF, d_down_EFD


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    gates: Tensor,
    token: Tensor,
    offsets: Tensor,
    by_token: Tensor,
    token_ends: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    hidden: Tensor,
    hidden_gate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_gate = x.new_empty(0) if gate is None else torch.empty_like(gate)
    return torch.empty_like(x), torch.empty_like(gates), torch.empty_like(up), d_gate, torch.empty_like(down)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, hidden, hidden_gate = output
    ctx.save_for_backward(*inputs, hidden, hidden_gate)
    ctx.mark_non_differentiable(hidden, hidden_gate)


def _gradients(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: recomputation gives them a single time
    d_x, d_gates, d_up, d_gate, d_down = _backward(dy.contiguous(), *saved)
    return d_x, d_gates, None, None, None, None, d_up, None if saved[7] is None else d_gate, d_down


_forward_op.register_autograd(_gradients, setup_context=_save_for_backward)


def _activate(hidden: Tensor, hidden_gate: Tensor | None) -> Tensor:
    """Return relu(h)², or silu(g) · h, as a new tensor."""
    if hidden_gate is None:
        activated = hidden.relu()
        return activated.mul_(activated)
    return F.silu(hidden_gate).mul_(hidden)


def grouped_product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Return ``x[rows of i] @ weight[i]`` for every expert i, in the dtype of ``x``: [M, D] × [E, D, F] → [M, F].

    It loops over the experts that have rows, unless CUDA has one kernel for all. On the CPU ``grouped_mm`` is the same
    loop over all experts, and wants all weights in the dtype of ``x``.
    """
    if _takes_grouped_mm(x, x.shape[1], weight.shape[2]):
        return F.grouped_mm(x, weight.to(x.dtype), offs=offsets)
    out = x.new_empty(x.shape[0], weight.shape[2])
    for i, start, end in _ranges(offsets):
        torch.mm(x[start:end], weight[i].to(x.dtype), out=out[start:end])
    return out


def grouped_outer(x: Tensor, y: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x[rows of i]ᵀ @ y[rows of i]`` for every expert i: [M, D] × [M, F] → [E, D, F] of a dtype.

    It is zero for an expert without rows.
    """
    if _takes_grouped_mm(x, x.shape[1], y.shape[1]):
        return F.grouped_mm(x.t(), y, offs=offsets).to(dtype)
    out = torch.empty(offsets.shape[0], x.shape[1], y.shape[1], dtype=dtype, device=x.device)
    for i, start, end in _ranges(offsets, with_empty=True):
        if dtype == x.dtype:  # without rows, mm gives zero
            torch.mm(x[start:end].t(), y[start:end], out=out[i])
        else:
            out[i].copy_(x[start:end].t() @ y[start:end])
    return out


def _ranges(offsets: Tensor, with_empty: bool = False) -> Iterator[tuple[int, int, int]]:
    """Yield each expert with the range of its rows."""
    start = 0
    for i, end in enumerate(offsets.tolist()):
        if end > start or with_empty:
            yield i, start, end
        start = end


def _takes_grouped_mm(x: Tensor, *row_sizes: int) -> bool:
    """Return whether ``grouped_mm`` has a kernel: on CUDA for bf16, with strides of whole 16 bytes."""
    aligned = all(size * x.element_size() % 16 == 0 for size in row_sizes)
    return aligned and x.device.type == "cuda" and x.dtype == torch.bfloat16
