"""Compiled blocks on the device: the numbers of eager ones, and no new graph for another number of pairs."""

import copy

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.setup import RULES, Setup, decoder, decoder_pass, update_state
from lightning_moe.model import Decoder
from lightning_moe.routing import Phase

pytestmark = pytest.mark.gpu


def pair(setup: Setup, rule: str) -> tuple[Decoder, Decoder]:
    """An eager decoder and its compiled copy."""
    eager = decoder(setup, RULES[rule])
    for moe in eager.moe_layers():
        moe.record = None
    compiled = copy.deepcopy(eager)
    compiled.compile_blocks()
    return eager, compiled


def gradients(model: Decoder, setup: Setup) -> list[Tensor]:
    torch.manual_seed(1)  # the same tokens
    decoder_pass(model, setup)()
    return [parameter.grad.detach().double() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("rule", "precision"),
    [
        ("expert threshold", "32-true"),
        ("dense", "bf16-mixed"),
        ("token choice", "bf16-mixed"),
        ("quantile balancing", "bf16-mixed"),
        ("expert choice", "bf16-mixed"),
        ("expert threshold", "bf16-mixed"),
    ],
)
def test_gradients_are_those_of_eager_blocks(rule: str, precision: str, device: torch.device) -> None:
    setup = Setup(
        hidden_size=128, num_tokens=2048, sequence_length=256, vocab_size=256, num_experts=8, num_layers=3,
        precision=precision, device=device,
    )  # fmt: skip
    eager, compiled = pair(setup, rule)
    tolerance = 1e-3 if precision == "32-true" else 0.1  # bf16: other roundings, and with them some other choices
    for found, expected in zip(gradients(compiled, setup), gradients(eager, setup), strict=True):
        assert float((found - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("rule", ["token choice", "expert threshold"])
def test_nothing_is_compiled_again_when_loads_change(rule: str, device: torch.device) -> None:
    setup = Setup(
        hidden_size=64, num_tokens=1024, sequence_length=256, vocab_size=64, num_experts=8, num_layers=3, device=device
    )
    _, compiled = pair(setup, rule)
    counters.clear()
    for moe in compiled.moe_layers():
        moe.train_phase = Phase.TRAIN
    graphs = []
    for _ in range(4):
        decoder_pass(compiled, setup)()  # other tokens each time
        update_state(compiled)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[1] >= 1
    assert not counters["graph_break"]


def test_sixteen_thousand_tokens_compile(gpu: torch.device) -> None:
    """A sum over [16, 16384] once became a split scan that Inductor of torch 2.11 could not generate."""
    setup = Setup(
        hidden_size=64, num_tokens=16384, sequence_length=2048, vocab_size=64, num_layers=2, precision="bf16-mixed",
        device=gpu,
    )  # fmt: skip
    _, compiled = pair(setup, "expert threshold")
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(compiled, setup))
