"""The sum per token: torch's operation and the Triton kernel, which Triton's interpreter runs on the CPU."""

import importlib
import warnings
from types import ModuleType

import pytest
import torch
from torch import Tensor

from lightning_moe.model import token_sum
from lightning_moe.model.pairs import Pairs, pack_pairs

DEVICE = torch.device(
    "cuda" if torch.cuda.is_available() else "cpu"
)  # on the CPU by Triton's interpreter (conftest.py)


@pytest.fixture
def kernel() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is for Linux")
    return importlib.import_module("lightning_moe.model.token_sum_kernel")


def example(num_tokens: int, hidden_size: int, room: int) -> tuple[Tensor, Pairs, Tensor, Tensor]:
    """Rows with NaN in the padding, the pairs, weights, and the sums by a loop in float64."""
    mask = torch.rand(num_tokens, 6) < 0.3
    mask[0] = False
    mask[1] = True
    pairs = pack_pairs(mask, max(1, int(mask.sum()) + room))
    rows = torch.randn(pairs.token.shape[0], hidden_size)
    weights = torch.rand(rows.shape[0])
    end = int(pairs.offsets[-1])
    rows[end:], weights[end:] = torch.nan, torch.nan
    expected = torch.zeros(num_tokens, hidden_size, dtype=torch.float64)
    for row in range(end):
        expected[pairs.token[row]] += rows[row].double() * weights[row].double()
    return rows, pairs, weights, expected


@pytest.mark.parametrize("room", [0, 1, 150])
@pytest.mark.parametrize("hidden_size", [8, 40, 1100])
def test_torchs_operation_leaves_padding_out(hidden_size: int, room: int) -> None:
    rows, pairs, weights, expected = example(17, hidden_size, room)
    found = token_sum.sum_per_token(rows, pairs.by_token, pairs.token_ends, weights)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("room", [0, 9])
@pytest.mark.parametrize("hidden_size", [8, 40, 1100])  # the last takes two programs per token
def test_the_kernel_sums_in_fp32(kernel: ModuleType, hidden_size: int, room: int, dtype: torch.dtype) -> None:
    rows, pairs, weights, _ = example(9, hidden_size, room)
    rows = rows.to(dtype)
    expected = torch.zeros(9, hidden_size, dtype=torch.float64)
    plain = torch.zeros_like(expected)
    for row in range(int(pairs.offsets[-1])):
        expected[pairs.token[row]] += rows[row].double() * weights[row].double()
        plain[pairs.token[row]] += rows[row].double()
    for given, exact in ((weights, expected), (None, plain)):
        on_device = [tensor.to(DEVICE) for tensor in (rows, pairs.by_token, pairs.token_ends)]
        found = kernel.token_sum(*on_device, None if given is None else given.to(DEVICE)).cpu()
        assert found.dtype == dtype
        # only the result is rounded; Triton's interpreter truncates instead
        rounding = 2.0**-7 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(found.double(), exact, rtol=rounding, atol=1e-6)


def test_the_kernel_is_used_if_it_is_right(kernel: ModuleType) -> None:
    token_sum._kernel_works.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert token_sum._kernel_works(DEVICE)


@pytest.mark.parametrize("fault", ["crash", "wrong", "reads padding"])
def test_a_kernel_that_fails_or_disagrees_is_switched_off_with_one_warning(
    fault: str, kernel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = kernel.token_sum

    def faulty(rows: Tensor, by_token: Tensor, token_ends: Tensor, weights: Tensor | None) -> Tensor:
        if fault == "crash":
            raise RuntimeError("no such instruction")
        ends = torch.cat([token_ends[:-1], token_ends.new_tensor([by_token.shape[0]])])
        found = right(rows, by_token, ends if fault == "reads padding" else token_ends, weights)
        return found * 1.1 if fault == "wrong" else found

    monkeypatch.setattr(kernel, "token_sum", faulty)
    token_sum._kernel_works.cache_clear()
    with pytest.warns(UserWarning, match="Triton kernel for sums per token does not work on c"):
        assert not token_sum._kernel_works(DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not token_sum._kernel_works(DEVICE), "said once"
    token_sum._kernel_works.cache_clear()
