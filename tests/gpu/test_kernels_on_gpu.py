"""The Triton kernels build on this GPU, and agree with torch: none is switched off."""

import warnings

import pytest
import torch

from lightning_moe.model import token_sum
from lightning_moe.optim import symmetric

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("works", [token_sum._kernel_works, symmetric._kernel_works], ids=["token sum", "symmetric"])
def test_the_kernel_is_used(works: object, gpu: torch.device) -> None:
    works.cache_clear()  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert works(gpu)  # type: ignore[operator]


@pytest.mark.parametrize("hidden_size", [8, 768, 1100])
def test_tokens_are_summed_in_fp32(hidden_size: int, gpu: torch.device) -> None:
    counts = torch.randint(0, 5, (1000,), device=gpu)
    token_ends, num_rows = counts.cumsum(0), int(counts.sum())
    rows = torch.randn(num_rows + 50, hidden_size, device=gpu).bfloat16()
    rows[num_rows:] = torch.nan  # padding
    weights = torch.rand(num_rows + 50, device=gpu)
    by_token = torch.cat([torch.randperm(num_rows, device=gpu), torch.arange(num_rows, num_rows + 50, device=gpu)])
    found = token_sum.sum_per_token(rows, by_token, token_ends, weights)
    ordered = (rows.double() * weights.double()[:, None])[by_token[:num_rows]]
    token = torch.arange(1000, device=gpu).repeat_interleave(counts)
    exact = torch.zeros(1000, hidden_size, dtype=torch.float64, device=gpu).index_add(0, token, ordered)
    torch.testing.assert_close(found.double(), exact, rtol=2.0**-8, atol=1e-5)
    assert torch.equal(found, token_sum.sum_per_token(rows, by_token, token_ends, weights)), "the same on every run"
