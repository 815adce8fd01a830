"""Layers on the device against float64: each rule and phase in loops; larger ones with all experts on all tokens."""

from contextlib import nullcontext

import pytest
import torch
from helpers.routing_reference import RULES, RULES_AND_PHASES, ReferenceMoE, make_state, name_of, reference_mask
from torch import Tensor

from lightning_moe.model import DecoderConfig, MoELayer
from lightning_moe.model.exact_product import exact_linear
from lightning_moe.model.experts import Experts
from lightning_moe.routing import Phase, RoutingRule
from lightning_moe.waits import as_if_reading_waited

pytestmark = pytest.mark.gpu
#: relative error of a whole tensor: sums of rounded products, in fp32 and in bf16
TOLERANCE = {"fp32": 1e-5, "bf16": 0.02}
PRECISIONS = list(TOLERANCE)


def make_layer(rule: RoutingRule, phase: Phase, **sizes: int) -> MoELayer:
    config = {"num_attention_heads": 1, "num_experts": 4, "hidden_size": 16, "expert_hidden_size": 24, **sizes}
    layer = MoELayer(DecoderConfig(**config), rule, 1)
    layer.state = make_state(rule, config["num_experts"], 1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-2] ** -0.5)
    layer.train_phase = phase
    return layer.train(phase is not Phase.CAUSAL)


def autocast(device: torch.device, precision: str) -> object:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def assert_close(found: Tensor, expected: Tensor, precision: str, name: str) -> None:
    found, expected = found.detach().double().cpu(), expected.detach().cpu()
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-12))
    assert error < TOLERANCE[precision], f"{name}: relative error {error:.2g}"


def assert_gradients(layer: MoELayer, x: Tensor, reference: ReferenceMoE, exact_x: Tensor, precision: str) -> None:
    assert_close(x.grad, exact_x.grad, precision, "x")
    for name, parameter in layer.named_parameters():
        expected = reference.weights[name].grad
        if expected is None or not expected.any():
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert_close(parameter.grad, expected, precision, name)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("rule", "phase"), RULES_AND_PHASES, ids=name_of)
def test_every_rule_is_eq_2(rule: RoutingRule, phase: Phase, precision: str, device: torch.device) -> None:
    layer = make_layer(rule, phase)
    reference, state = ReferenceMoE.of(layer), make_state(rule, 4, 1)
    x = torch.randn(2, 8, 16)
    exact_x, weights = x.double().requires_grad_(), torch.randn(2, 8, 16)
    mask = reference_mask(rule, reference.logits(exact_x), state, phase)
    exact_y = reference.forward(exact_x, mask, layer.gate, layer.normalize_gates)
    (exact_y * weights.double()).sum().backward()

    layer.to(device)
    on_device = x.to(device).requires_grad_()
    with autocast(device, precision):
        y, _ = layer(on_device)
    (y * weights.to(device)).sum().backward()
    assert torch.equal(layer.record.selection.mask.cpu(), mask)
    assert_close(y, exact_y, precision, "y")
    assert_gradients(layer, on_device, reference, exact_x, precision)


def dense_reference(layer: MoELayer, reference: ReferenceMoE, x: Tensor, mask: Tensor) -> Tensor:
    """Every token through every expert, weighted by gate and mask; [N, D] in float64."""
    w = reference.weights
    gates = (x @ w["router.weight"].t()).sigmoid() * mask
    hidden = torch.einsum("nd,edf->nef", x, w["experts.up"]).relu().square()
    y = torch.einsum("nef,efd,ne->nd", hidden, w["experts.down"], gates)
    shared = (x @ w["shared_expert.up.weight"].t()).relu().square() @ w["shared_expert.down.weight"].t()
    return y + shared


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_large_layers_are_eq_2(rule: RoutingRule, precision: str, device: torch.device) -> None:
    """Sizes that fill tiles of the grouped kernels, and loads that do not divide by them."""
    batch, length = (4, 1000) if device.type == "cuda" else (2, 100)
    layer = make_layer(rule, Phase.TRAIN, num_experts=16, hidden_size=128, expert_hidden_size=256)
    layer.state.reset_parameters()  # thresholds of 0: loads far from equal
    reference = ReferenceMoE.of(layer.to(device))
    x = torch.randn(batch, length, 128, device=device).requires_grad_()
    with autocast(device, precision):
        y, _ = layer(x)
    weights = torch.randn_like(x)
    (y * weights).sum().backward()
    exact_x = x.detach().double().flatten(0, 1).requires_grad_()
    mask = layer.record.selection.mask.flatten(0, 1)
    assert mask.any()
    exact_y = dense_reference(layer, reference, exact_x, mask)
    (exact_y * weights.double().flatten(0, 1)).sum().backward()
    assert_close(y.flatten(0, 1), exact_y, precision, "y")
    assert_close(x.grad.flatten(0, 1), exact_x.grad, precision, "x")
    for name, parameter in layer.named_parameters():
        assert_close(parameter.grad, reference.weights[name].grad, precision, name)


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_the_router_is_exact_whatever_the_precision_of_products(setting: str, device: torch.device) -> None:
    """TF32 has 10 bits after the point, so its products differ by 1e-4 and more; fp32's by 1e-7."""
    x, weight = torch.randn(512, 768, device=device), torch.randn(16, 768, device=device)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    cotangent = torch.randn(512, 16, device=device)
    try:
        torch.set_float32_matmul_precision(setting)
        logits = exact_linear(*leaves)
        logits.backward(cotangent)
    finally:
        torch.set_float32_matmul_precision("highest")
    exact = [
        x.double() @ weight.double().t(),
        cotangent.double() @ weight.double(),
        cotangent.double().t() @ x.double(),
    ]
    for found, expected in zip((logits, leaves[0].grad, leaves[1].grad), exact, strict=True):
        assert float((found.detach().double() - expected).norm() / expected.norm()) < 2e-6


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_packed_pairs_give_what_counted_ones_give(precision: str, activation: str, device: torch.device) -> None:
    """With room for more pairs than there are. Freed memory full of NaN stands in for rows that nobody writes."""
    experts = Experts(8, 64, 128, activation).to(device)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, gates = torch.randn(1000, 64, device=device), torch.rand(1000, 8, device=device)
    mask = torch.rand(1000, 8, device=device) < 0.2
    cotangent = torch.randn(1000, 64, device=device)

    def outputs_and_gradients(max_pairs: int | None) -> list[Tensor]:
        experts.zero_grad()
        junk = [torch.full((size,), torch.nan, device=device) for size in (2**16, 2**18, 2**20, 2**22)]
        del junk
        leaves = [tensor.clone().requires_grad_() for tensor in (x, gates)]
        with autocast(device, precision), as_if_reading_waited():
            y = experts(leaves[0], mask, leaves[1], max_pairs)
        y.backward(cotangent.to(y.dtype))
        return [y.detach(), *(leaf.grad for leaf in leaves), *(parameter.grad for parameter in experts.parameters())]

    expected = outputs_and_gradients(None)
    for found, wanted in zip(outputs_and_gradients(int(mask.sum()) + 777), expected, strict=True):
        assert bool(found.isfinite().all())
        assert_close(found, wanted.double(), precision, "a result")
