"""The sum of the weighted rows of each token, always in the same order.

A token's rows are added one after the other, in the order of its experts, so that the sum is the same on every run.
``index_add_`` takes twice as long on the CPU, and adds in any order on CUDA.

Shape letters: N tokens, M rows, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_moe.internals.triton import kernel_works

_PADDING_AT_A_TIME = 64  # rows of padding that are summed together, by `_embedding_bag`


def sum_per_token(rows: Tensor, by_token: Tensor, token_ends: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum the weighted rows of each token.

    On CUDA a Triton kernel adds them in fp32. Elsewhere, and where that kernel does not work, it is torch's embedding
    bag.

    Args:
        rows: [M, D].
        by_token: positions of the rows in the order of their tokens, int64 [M].
        token_ends: ends of the tokens' rows in ``by_token``, int64 [N]; rows after the last one are not read, or not
            used.
        weights: weight of each row, [M]; `None` for 1.

    Returns:
        [N, D] in the dtype of ``rows``; zero for a token without rows.
    """
    if not token_ends.numel():  # under expert parallelism a rank may receive nothing
        return rows.new_zeros(0, rows.shape[1])
    if rows.device.type == "cuda" and _kernel_works(rows.device):
        return _kernel(rows, by_token, token_ends, weights)
    return _embedding_bag(rows, by_token, token_ends, weights)


def _embedding_bag(rows: Tensor, by_token: Tensor, token_ends: Tensor, weights: Tensor | None) -> Tensor:
    if weights is not None:
        weights = weights.index_select(0, by_token).to(rows.dtype)
    num_tokens, num_rows = token_ends.shape[0], by_token.shape[0]
    # The last bag always goes to the end. So padding has bags of its own, small ones, because each is one long sum.
    padding = token_ends[-1] + _PADDING_AT_A_TIME * torch.arange(num_rows // _PADDING_AT_A_TIME + 1, device=rows.device)
    starts = torch.cat([token_ends.new_zeros(1), token_ends[:-1], padding.clamp_max_(num_rows)])
    return F.embedding_bag(by_token, rows, starts, mode="sum", per_sample_weights=weights)[:num_tokens]


def _kernel(rows: Tensor, by_token: Tensor, token_ends: Tensor, weights: Tensor | None) -> Tensor:
    from lightning_moe.model.token_sum_kernel import token_sum  # needs Triton

    with torch.cuda.device(rows.device) if rows.is_cuda else nullcontext():  # Triton launches on the current device
        return token_sum(rows.contiguous(), by_token, token_ends, weights)


@functools.cache
def _kernel_works(device: torch.device) -> bool:
    """Return whether the kernel gives what torch gives on a device; look once."""
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(24, 40, device=device, generator=generator)
    weights = torch.rand(24, device=device, generator=generator)
    by_token = torch.randperm(24, device=device, generator=generator)
    token_ends = torch.tensor([3, 3, 7, 12, 12, 20], device=device)  # the last 4 rows are padding
    rows[by_token[20:]] = torch.nan

    def results() -> Iterator[tuple[Tensor, Tensor, float]]:
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            for given in (None, weights):
                arguments = (rows.to(dtype), by_token, token_ends, given)
                yield _kernel(*arguments), _embedding_bag(*arguments), tolerance

    return kernel_works("sums per token", "training goes on with a slower operation of torch", device, results)
