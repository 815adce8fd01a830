"""The router's products are exact in fp32 under every setting of torch, which they leave as it was."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_moe.model import exact_product
from lightning_moe.model.exact_product import exact_float32, exact_linear
from lightning_moe.model.moe import Router

SETTINGS = ("highest", "high", "medium", "newer tf32", "newer bf16", "allow_tf32")


@pytest.fixture(autouse=True)
def _setting_is_put_back() -> Iterator[None]:
    yield
    for place in exact_product._PLACES:
        place.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def choose(setting: str) -> None:
    if setting == "newer tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    elif setting == "newer bf16":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    elif setting == "allow_tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        torch.set_float32_matmul_precision(setting)


def state() -> list[object]:
    """What torch's interfaces say; the older ones refuse to answer after some uses of the newer one."""

    def older(get: object) -> object:
        try:
            return get()  # type: ignore[operator]
        except RuntimeError:
            return "mixed"

    found = [older(torch.get_float32_matmul_precision), older(torch._C._get_cublas_allow_tf32)]
    return [*found, *(place.fp32_precision for place in exact_product._PLACES)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_setting_is_exact_inside_and_the_same_after(setting: str) -> None:
    choose(setting)
    before = state()
    with exact_float32():
        assert set(state()[2:]) <= {"none", "ieee"}
        assert state()[1] is False  # and torch's own functions that ask for it get an answer
        with exact_float32():
            pass
        assert set(state()[2:]) <= {"none", "ieee"}
    assert state() == before
    with pytest.raises(KeyError), exact_float32():
        raise KeyError
    assert state() == before


def gradients(router: Router, x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    router.zero_grad()
    x = x.detach().requires_grad_()
    logits = router(x)
    logits.backward(weights)
    return logits.detach(), x.grad, router.weight.grad


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cosine", [False, True])
def test_logits_and_gradients_are_those_of_fp32_where_bf16_is_allowed(cosine: bool, compiled: bool) -> None:
    """On a CPU with bf16 instructions, 'medium' changes a plain product; on others the test has nothing to find."""
    router, x, weights = Router(256, 16, cosine), torch.randn(8, 128, 256), torch.randn(8, 128, 16)
    expected = gradients(router, x, weights)
    torch.set_float32_matmul_precision("medium")
    if compiled:
        torch.compiler.reset()
        router.compile(fullgraph=True)
    for found, wanted in zip(gradients(router, x, weights), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-4 if compiled else 1e-6)
    with torch.no_grad():
        torch.testing.assert_close(router(x), expected[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_gradients_and_dtypes_are_those_of_linear(dtype: torch.dtype, autocast: bool) -> None:
    x, weight, weights = torch.randn(2, 8, 32).to(dtype), torch.randn(4, 32), torch.randn(2, 8, 4)
    ours, theirs = ([t.clone().requires_grad_() for t in (x, weight)] for _ in range(2))
    plain = F.linear(theirs[0].float(), theirs[1])
    plain.backward(weights)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        found = exact_linear(*ours)
        found.backward(weights)  # autocast is also on here, as in a backward pass inside of the block
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)
    for got, want in zip(ours, theirs, strict=True):
        assert got.grad.dtype == got.dtype
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-6, atol=1e-6)


def test_the_operation_is_right_for_the_compiler() -> None:
    x, weight = torch.randn(2, 3, 8).bfloat16().requires_grad_(), torch.randn(4, 8).requires_grad_()
    torch.library.opcheck(torch.ops.lightning_moe.exact_linear, (x, weight))
    arguments = (torch.randn(2, 3, 4), x.detach(), weight.detach())
    torch.library.opcheck(torch.ops.lightning_moe.exact_linear_backward, arguments)
