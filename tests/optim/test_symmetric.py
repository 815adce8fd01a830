"""The kernel of products with a symmetric result against float64, by Triton's interpreter on the CPU."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lightning_moe.optim import symmetric
from lightning_moe.optim.symmetric import symmetric_product

SHAPES = [(2, 200, 136), (1, 128, 64), (2, 5, 300), (1, 130, 1)]  # several tiles, one, less than one


def views(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Matrices, their transposes, and rows and columns of larger ones."""
    batch, rows, columns = shape
    x = torch.randn(shape).to(dtype)
    return [x, x.mT, torch.randn(batch, 2 * rows, 2 * columns).to(dtype)[:, ::2, ::2]]


def compare_kernel_with_float64() -> None:
    for shape in SHAPES:
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 2e-3)):  # the interpreter lacks bfloat16
            for x in views(shape, dtype):
                found = symmetric.half_product(x, None, 0.0, 0.25)
                expected = 0.25 * x.double() @ x.double().mT
                assert (found.double() - expected).abs().max() < tolerance * expected.abs().max(), (shape, dtype)
                added = symmetric.half_product(x, found, 2.0, -0.5)
                expected = 2 * found.double() - 0.5 * x.double() @ x.double().mT
                assert (added.double() - expected).abs().max() < tolerance * found.abs().max() * 4, (shape, dtype)
                assert torch.equal(added, added.mT)


def test_half_of_the_tiles_are_the_whole_product() -> None:
    pytest.importorskip("triton")
    code = f"import sys; sys.path.insert(0, {str(__file__).rpartition('/')[0]!r})\n"
    code += "import test_symmetric; test_symmetric.compare_kernel_with_float64()"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True, timeout=600)


def test_other_devices_use_torchs_products() -> None:
    x, gram = torch.randn(2, 4, 6), torch.eye(4).expand(2, 4, 4)
    torch.testing.assert_close(symmetric_product(x), x @ x.mT)
    torch.testing.assert_close(symmetric_product(x, gram, beta=2.0, alpha=3.0), 3 * x @ x.mT + 2 * gram)


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (
            lambda x, add, beta, alpha: x.new_zeros(x.shape[0], x.shape[1], x.shape[1]),
            "symmetric products does not work on cpu .AssertionError: Tensor-likes are not close",
        ),
        (lambda *arguments: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_kernel_that_fails_is_not_used(kernel: object, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetric, "half_product", kernel)
    symmetric._kernel_works.cache_clear()
    with pytest.warns(UserWarning, match=reason):
        assert not symmetric._kernel_works(torch.device("cpu"))
    assert not symmetric._kernel_works(torch.device("cpu"))  # without another warning
    symmetric._kernel_works.cache_clear()
    monkeypatch.setattr(symmetric, "half_product", symmetric._whole_product)
    assert symmetric._kernel_works(torch.device("cpu"))
    symmetric._kernel_works.cache_clear()
