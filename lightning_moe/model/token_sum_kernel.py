"""The Triton kernel of `model.token_sum`. Importing it needs Triton, which torch's CUDA builds bring."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # columns of a program at most


def token_sum(rows: Tensor, by_token: Tensor, token_ends: Tensor, weights: Tensor | None) -> Tensor:
    """Sum the weighted rows of each token in fp32; the arguments are those of `token_sum.sum_per_token`.

    ``rows`` must be contiguous. Each program adds the rows of one token in a block of columns, one after the other.
    """
    num_tokens, hidden_size = token_ends.shape[0], rows.shape[1]
    out = rows.new_empty(num_tokens, hidden_size)
    block = min(_BLOCK, triton.next_power_of_2(hidden_size))
    _token_sum[(num_tokens, triton.cdiv(hidden_size, block))](
        rows,
        by_token,
        token_ends,
        rows if weights is None else weights,
        out,
        hidden_size,
        has_weights=weights is not None,
        block=block,
    )
    return out


@triton.jit
def _token_sum(  # type: ignore[no-untyped-def]
    rows, by_token, token_ends, weights, out, hidden_size, has_weights: tl.constexpr, block: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < hidden_size
    position = tl.load(token_ends + token - 1, mask=token > 0, other=0)
    end = tl.load(token_ends + token)
    total = tl.zeros([block], tl.float32)
    while position < end:  # Triton 3.6's interpreter cannot take a range of loaded numbers
        row = tl.load(by_token + position)
        values = tl.load(rows + row * hidden_size + columns, mask=inside, other=0.0).to(tl.float32)
        if has_weights:
            values *= tl.load(weights + row).to(tl.float32)
        total += values
        position += 1
    tl.store(out + token * hidden_size + columns, total.to(out.dtype.element_ty), mask=inside)
