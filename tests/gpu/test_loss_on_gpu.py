"""Head and loss in chunks on the device: value and gradients against float64, and the memory that they do not take."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from benchmarks.measurement import peak_memory
from lightning_moe.model.loss_head import IGNORED, chunked_next_token_loss

pytestmark = pytest.mark.gpu


def exact(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> list[Tensor]:
    """Loss of each position and both gradients of the sum, the plain way in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logits = leaves[0] @ leaves[1].t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    counted = labels != IGNORED
    chosen = logits.gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)
    losses = (logits.logsumexp(-1) - chosen) * counted
    losses.sum().backward()
    return [losses.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.02)])
def test_value_and_gradients_are_those_of_float64(
    precision: str, tolerance: float, softcap: float | None, device: torch.device
) -> None:
    hidden = torch.randn(4, 250, 64, device=device).requires_grad_()
    weight = (torch.randn(1000, 64, device=device) / 8).requires_grad_()
    labels = torch.randint(1000, (4, 250), device=device)
    labels[:, ::7] = IGNORED
    with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
        total, token_loss = chunked_next_token_loss(hidden, weight, labels, softcap, chunk=300)
    total.backward()
    expected = exact(hidden, weight, labels, softcap)
    assert bool((token_loss[:, ::7] == 0).all())
    assert float(total.detach()) == pytest.approx(float(expected[0].sum()), rel=tolerance)
    for found, wanted in zip((token_loss, hidden.grad, weight.grad), expected, strict=True):
        assert float((found.detach().double() - wanted).norm() / wanted.norm()) < tolerance


def test_the_logits_never_exist_at_once(device: torch.device) -> None:
    """Two chunks of logits in fp32 and one in bf16, with the gradients of both operands, and a fifth on top."""
    tokens, size, vocabulary, chunk = (16384, 768, 65536, 1024) if device.type == "cuda" else (1024, 64, 4096, 128)
    hidden = torch.randn(1, tokens, size, device=device).requires_grad_()
    weight = (torch.randn(vocabulary, size, device=device) / size**0.5).requires_grad_()
    labels = torch.randint(vocabulary, (1, tokens), device=device)

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            total, _ = chunked_next_token_loss(hidden, weight, labels, 15.0, chunk)
        total.backward()

    run()
    hidden.grad = weight.grad = None
    gradients = 2 * 4 * (hidden.numel() + weight.numel())  # once as made, once as kept by the parameter
    rounded = 2 * (hidden.numel() + weight.numel())
    assert peak_memory(run, device) <= 1.2 * ((2 * 4 + 2) * chunk * vocabulary + gradients + rounded)
