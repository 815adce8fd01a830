"""Products with a symmetric result, of which a Triton kernel computes half, for Newton–Schulz on CUDA.

Not yet measured on a GPU. For matrices of 768 x 1536 the kernel computes 21 of 36 tiles. By the counts, a step of the
iteration then takes the work of 3.75 instead of 5 products of two 768 x 768 matrices, and a matrix that is added is not
copied first.

Shape letters: B matrices of a batch, M rows, K columns.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_moe.internals.triton import kernel_works

_TILE, _TILE_K = 128, 64
_SIZES = (3, 200, 136)  # of the check: no multiples of the tiles


def symmetric_product(x: Tensor, add: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
    """Compute ``alpha · X Xᵀ + beta · add``.

    Args:
        x: matrices [B, M, K], of any strides.
        add: symmetric matrices [B, M, M] to add; `None` for none.
        beta: factor of ``add``.
        alpha: factor of the product.

    Returns:
        [B, M, M] in the dtype of ``x``; exactly symmetric where the kernel computes it (bfloat16 on CUDA, if the kernel
        gave the right result for a small product on this device).
    """
    if x.is_cuda and x.dtype == torch.bfloat16 and _kernel_works(x.device):
        return half_product(x, add, beta, alpha)
    return _whole_product(x, add, beta, alpha)


def _whole_product(x: Tensor, add: Tensor | None, beta: float, alpha: float) -> Tensor:
    return torch.bmm(x, x.mT) if add is None else torch.baddbmm(add, x, x.mT, beta=beta, alpha=alpha)


@functools.cache
def _kernel_works(device: torch.device) -> bool:
    """Return whether the kernel gives what torch gives on a device; look once."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_SIZES, generator=generator).to(device, torch.bfloat16)

    def results() -> Iterator[tuple[Tensor, Tensor, float]]:
        gram = _whole_product(x, None, 0.0, 1.0)
        yield half_product(x, None, 0.0, 1.0), gram, 2e-2
        yield half_product(gram, gram, 2.0, 0.5), _whole_product(gram, gram, 2.0, 0.5), 2e-2

    return kernel_works("symmetric products", "Muon uses torch's products", device, results)


def half_product(x: Tensor, add: Tensor | None, beta: float, alpha: float) -> Tensor:
    """Compute the tiles on and below the diagonal, and write each to both of its places; see `symmetric_product`."""
    import triton

    batch, rows, columns = x.shape
    out = torch.empty(batch, rows, rows, dtype=x.dtype, device=x.device)
    added = out if add is None else add.contiguous()
    tiles = triton.cdiv(rows, _TILE)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():  # Triton launches on the current device
        _kernel()[(tiles, tiles, batch)](
            *(x, added, out, rows, columns, *x.stride(), alpha, beta),
            add is not None,
            _TILE,
            _TILE_K,
            num_warps=8,
            num_stages=3,
        )
    return out


@functools.cache
def _kernel() -> Any:
    """Return the kernel; triton is imported where it is used, because builds of torch for CPUs lack it."""
    from lightning_moe.optim.symmetric_kernel import half_product_kernel

    return half_product_kernel
