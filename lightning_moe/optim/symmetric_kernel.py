"""The Triton kernel of `optim.symmetric`."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# Triton reads the annotations of a kernel's parameters, so they cannot be types of Python.

import triton
import triton.language as tl


@triton.jit
def half_product_kernel(
    x_ptr,
    add_ptr,
    out_ptr,
    rows,
    COLUMNS: tl.constexpr,
    x_stride_b,
    x_stride_m,
    x_stride_k,
    alpha,
    beta,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Write tile (i, j) and tile (j, i) of alpha · X Xᵀ + beta · add for i ≥ j; ``add`` and ``out`` are contiguous."""
    i, j = tl.program_id(0), tl.program_id(1)
    if j > i:
        return
    matrix = tl.program_id(2).to(tl.int64)
    rows_i, rows_j = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    inside_i, inside_j = rows_i < rows, rows_j < rows
    x_ptr += matrix * x_stride_b
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, COLUMNS, TILE_K):
        ks = start + tl.arange(0, TILE_K)
        inside_k = ks < COLUMNS
        left = tl.load(
            x_ptr + rows_i[:, None] * x_stride_m + ks[None, :] * x_stride_k,
            mask=inside_i[:, None] & inside_k[None, :],
            other=0.0,
        )
        right = tl.load(
            x_ptr + ks[:, None] * x_stride_k + rows_j[None, :] * x_stride_m,
            mask=inside_k[:, None] & inside_j[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total)
    total *= alpha
    below = matrix * rows * rows + rows_i[:, None] * rows + rows_j[None, :]
    inside = inside_i[:, None] & inside_j[None, :]
    if ADD:
        total += beta * tl.load(add_ptr + below, mask=inside, other=0.0).to(tl.float32)
    result = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + below, result, mask=inside)
    if i > j:
        above = matrix * rows * rows + rows_j[:, None] * rows + rows_i[None, :]
        tl.store(out_ptr + above, tl.trans(result), mask=inside_j[:, None] & inside_i[None, :])
