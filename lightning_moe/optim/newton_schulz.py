"""Newton–Schulz orthogonalisation: the inner loop of Muon.

An odd quintic polynomial is iterated on G / ||G||_F, and maps a matrix G = U S V^T to about U V^T. The published
coefficients (Keller Jordan, 2024) prefer a steep slope at zero to convergence: after 5 steps the singular values lie
in [0.68, 1.21] for every singular value above 0.002 ||G||_F; tiny ones grow by 3.4445 per step, 485 times in all.

The caller chooses the precision. In float32 a step depends on how its batch was split (ranks, accumulation) as little
as the gradient does. bfloat16 is cheaper where it is native (the iteration corrects its own rounding, and its result is
only a direction), but the rounding amplifies such differences: after 20 steps of a tiny model, splits of one batch
differed by 1e-3 in the loss with bfloat16 and by 5e-7 with float32. Time on CPU, one thread, 16 matrices of 192 x 384,
float32 -> bfloat16: 69 -> 37 ms on a CPU with AVX512-BF16. Without those instructions bfloat16 is emulated and slower:
71 -> 163 ms with AVX512 only, 88 -> 1193 ms with AVX2.

Tried and not kept: iterating on the Gram matrix needs fewer multiplications for wide matrices (1.15 times faster for
192 x 384, slower for square ones), but in bfloat16 it amplifies the rounding of ill-conditioned matrices (singular
values up to 1.63). Preallocated outputs for the products made no difference beyond noise.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_moe.optim.symmetric import symmetric_product

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
# A matrix with a smaller norm is not scaled up to 1: an exact zero stays zero.
EPSILON = 1e-7


@functools.cache
def cheapest_dtype(device_type: str) -> torch.dtype:
    """Return the cheapest dtype of the iteration on a device type: bfloat16 where it is native, else float32."""
    if device_type != "cpu":
        return torch.bfloat16
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch lacks it
    return torch.bfloat16 if capabilities.get("avx512_bf16") else torch.float32


def orthogonalize(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Bring all singular values of each matrix near 1, and keep its singular vectors.

    Args:
        matrices: [batch, rows, columns], any floating dtype; each matrix is treated alone. Not modified.
        dtype: dtype of the iteration; by default ``cheapest_dtype`` of the device.

    Returns:
        [batch, rows, columns] in ``dtype``. A zero matrix gives zero.
    """
    return orthogonalize_together([matrices], dtype)[0]


def orthogonalize_together(stacks: Sequence[Tensor], dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Orthogonalise stacks of matrices of one shape as one batch: as many launches on a device as for one stack.

    Args:
        stacks: tensors [batch, rows, columns], as for `orthogonalize`; their batches may differ. Not modified.
        dtype: dtype of the iteration; by default ``cheapest_dtype`` of the device.

    Returns:
        Tensors like ``stacks``, in ``dtype``; views of one tensor.
    """
    a, b, c = COEFFICIENTS
    dtype = dtype or cheapest_dtype(stacks[0].device.type)
    lengths = [len(stack) for stack in stacks]
    x = stacks[0].new_empty(sum(lengths), *stacks[0].shape[1:], dtype=dtype)
    for stack, part in zip(stacks, torch.split(x, lengths), strict=True):
        norm = torch.linalg.vector_norm(stack.float(), dim=(-2, -1), keepdim=True)
        torch.div(stack, norm.clamp(min=EPSILON), out=part)  # rounded once, where it is needed
    tall = x.shape[-2] > x.shape[-1]
    for _ in range(STEPS):
        # X ← aX + (bA + cA²)X with A = XXᵀ; for a tall X the same polynomial from the right, where XᵀX is smaller.
        gram = symmetric_product(x.mT if tall else x)
        polynomial = symmetric_product(gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, polynomial, beta=a) if tall else torch.baddbmm(x, polynomial, x, beta=a)
    return torch.split(x, lengths)
