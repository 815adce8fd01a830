"""A product in exact fp32, whatever precision the user has set for fp32 products (decision 89).

``torch.set_float32_matmul_precision("high")`` puts fp32 products of a GPU on TF32, with ten bits after the point, and
``"medium"`` those of a CPU on bf16. The router's logits would then tie, and thresholds move. The setting is global and
read while a product runs, also in the backward pass and in compiled code. So the product is an operation of its own,
forward and backward, that changes the setting inside and puts it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: places where torch keeps the precision of fp32 products, and values that leave them exact
_PLACES: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul"))  # noqa: B009
_EXACT = ("none", "ieee")


@contextmanager
def exact_float32() -> Iterator[None]:
    """Make fp32 products exact inside the block, in all threads.

    torch has an older and a newer interface for the setting, and many of its functions raise an error when the two
    disagree. So a setting that the older one can express is changed and put back through the older one.
    """
    if all(place.fp32_precision in _EXACT for place in _PLACES):
        yield
        return
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # set through the newer interface alone
        older = "highest"
    newer = [place.fp32_precision for place in _PLACES]
    try:
        if older != "highest":
            torch.set_float32_matmul_precision("highest")
        for place in _PLACES:
            if place.fp32_precision not in _EXACT:
                place.fp32_precision = "ieee"
        yield
    finally:
        if older != "highest":
            torch.set_float32_matmul_precision(older)
        for place, value in zip(_PLACES, newer, strict=True):
            if place.fp32_precision != value:
                place.fp32_precision = value


def exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x Wᵀ in exact fp32, forward and backward, also under autocast.

    Args:
        x: [..., D] of any floating dtype; it is kept for the backward pass as it is, not in fp32.
        weight: fp32 [E, D].

    Returns:
        fp32 [..., E].
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        result: Tensor = _product_op(x, weight)
        return result
    return _product(x, weight)  # torch's dispatcher would cost more than the product of one token


def _product(x: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False), exact_float32():
        return x.float() @ weight.t()


_product_op = torch.library.custom_op("lightning_moe::exact_linear", _product, mutates_args=())


@_product_op.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=torch.float32)


@torch.library.custom_op("lightning_moe::exact_linear_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, in its dtype, and of the weight."""
    rows_NE = dy.reshape(-1, dy.shape[-1])
    rows_ND = x.reshape(-1, x.shape[-1]).float()
    with torch.autocast(x.device.type, enabled=False), exact_float32():
        d_x = (rows_NE @ weight).to(x.dtype).view(x.shape)
        d_weight = (rows_ND.t() @ rows_NE).t().contiguous()
    return d_x, d_weight


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors  # read once: recomputation gives them a single time
    d_x, d_weight = _backward(dy, x, weight)
    return d_x, d_weight


_product_op.register_autograd(_gradients, setup_context=_save_for_backward)
