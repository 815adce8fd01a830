"""The MoE layer against the slow loop of Eq. 2 in float64, for every rule, phase and option."""

import pytest
import torch
from helpers.routing_reference import RULES_AND_PHASES, ReferenceMoE, make_state, name_of, reference_mask
from torch import Tensor

from lightning_moe.model import DecoderConfig, MoELayer
from lightning_moe.routing import ExpertThreshold, Phase, RoutingRule, RoutingState, Selection, TokenChoice

BATCH, LENGTH, HIDDEN, EXPERTS = 2, 8, 8, 4


def make_layer(rule: RoutingRule, phase: Phase, num_experts_per_token: float = 1, **options: object) -> MoELayer:
    settings = {"hidden_size": HIDDEN, "num_attention_heads": 1, "num_experts": EXPERTS, "expert_hidden_size": 12}
    layer = MoELayer(DecoderConfig(**{**settings, **options}), rule, num_experts_per_token)
    layer.state = make_state(rule, EXPERTS, num_experts_per_token)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    layer.train_phase = phase
    return layer.train(phase is not Phase.CAUSAL)


def assert_equals_reference(layer: MoELayer, x: Tensor) -> Tensor:
    """Output, and the gradient of every parameter and of x, equal the loop's; returns the mask."""
    reference = ReferenceMoE.of(layer)
    exact_x = x.detach().double().requires_grad_()
    mask = reference_mask(layer.rule, reference.logits(exact_x), layer.state, layer.phase)
    x = x.detach().requires_grad_()
    y, _ = layer(x)
    assert layer.record is not None
    assert torch.equal(layer.record.selection.mask, mask)
    exact_y = reference.forward(exact_x, mask, layer.gate, layer.normalize_gates)
    torch.testing.assert_close(y.double(), exact_y, rtol=1e-5, atol=1e-5)

    weights = torch.randn_like(exact_y)
    (y * weights.float()).sum().backward()
    (exact_y * weights).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-4, atol=1e-4)
    for name, parameter in layer.named_parameters():
        expected = reference.weights[name].grad
        assert parameter.grad is not None, f"{name} has no gradient"
        expected = torch.zeros_like(parameter.grad).double() if expected is None else expected
        torch.testing.assert_close(parameter.grad.double(), expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: n + m)
    return mask


@pytest.mark.parametrize(("rule", "phase"), RULES_AND_PHASES, ids=name_of)
@pytest.mark.parametrize("normalize_gates", [False, True], ids=["", "normalized"])
@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@pytest.mark.parametrize("num_shared_experts", [0, 2])
def test_layer_is_eq_2(
    rule: RoutingRule, phase: Phase, normalize_gates: bool, gate: str, activation: str, num_shared_experts: int
) -> None:
    layer = make_layer(
        rule,
        phase,
        gate=gate,
        normalize_gates=normalize_gates,
        activation=activation,
        num_shared_experts=num_shared_experts,
    )
    assert_equals_reference(layer, torch.randn(BATCH, LENGTH, HIDDEN))


@pytest.mark.parametrize(("rule", "phase"), RULES_AND_PHASES, ids=name_of)
def test_cosine_router_is_eq_2(rule: RoutingRule, phase: Phase) -> None:
    layer = make_layer(rule, phase, router="cosine")
    with torch.no_grad():
        layer.router.scale.fill_(2.5)
    assert_equals_reference(layer, torch.randn(BATCH, LENGTH, HIDDEN))


@pytest.mark.parametrize(("rule", "phase"), RULES_AND_PHASES, ids=name_of)
def test_two_experts_per_token_and_sizes_that_grouped_mm_refuses(rule: RoutingRule, phase: Phase) -> None:
    """Rows of 6 and 5 floats are no whole 16 bytes: the loop over experts takes over."""
    layer = make_layer(rule, phase, 2, hidden_size=6, expert_hidden_size=5)
    assert_equals_reference(layer, torch.randn(BATCH, LENGTH, 6))


@pytest.mark.parametrize("expert_hidden_size", [12, 5], ids=["grouped_mm", "loop"])
@pytest.mark.parametrize("num_shared_experts", [0, 1])
def test_no_token_selected_gives_the_shared_output_and_zero_gradients(
    expert_hidden_size: int, num_shared_experts: int
) -> None:
    rule = ExpertThreshold(capacity_factor=None)
    layer = make_layer(rule, Phase.TRAIN, expert_hidden_size=expert_hidden_size, num_shared_experts=num_shared_experts)
    layer.state["threshold"].fill_(torch.inf)
    mask = assert_equals_reference(layer, torch.randn(BATCH, LENGTH, HIDDEN))
    assert not mask.any()
    for parameter in (layer.router.weight, *layer.experts.parameters()):
        assert not parameter.grad.any()


@pytest.mark.parametrize("expert_hidden_size", [12, 5], ids=["grouped_mm", "loop"])
def test_every_token_to_every_expert(expert_hidden_size: int) -> None:
    rule = ExpertThreshold(capacity_factor=None)
    layer = make_layer(rule, Phase.TRAIN, expert_hidden_size=expert_hidden_size)
    layer.state["threshold"].fill_(-torch.inf)
    assert assert_equals_reference(layer, torch.randn(BATCH, LENGTH, HIDDEN)).all()
    layer = make_layer(TokenChoice(), Phase.TRAIN, EXPERTS, expert_hidden_size=expert_hidden_size)
    assert assert_equals_reference(layer, torch.randn(BATCH, LENGTH, HIDDEN)).all()


def test_experts_without_a_token_have_zero_gradients_not_none() -> None:
    layer = make_layer(ExpertThreshold(capacity_factor=None), Phase.TRAIN)
    layer.state["threshold"].copy_(torch.tensor([torch.inf, -torch.inf, torch.inf, 0.0]))
    mask = assert_equals_reference(layer, torch.randn(BATCH, LENGTH, HIDDEN))
    assert mask.sum((0, 1))[0] == 0
    for parameter in layer.experts.parameters():
        assert not parameter.grad[0].any()
        assert parameter.grad[1].any()


def test_added_tokens_carry_their_real_gate_and_gradient() -> None:
    """A starved expert (no token above its threshold) learns from those that the capacity's lower bound adds."""
    layer = make_layer(ExpertThreshold(capacity_factor=0.5), Phase.TRAIN)
    layer.state["threshold"].fill_(torch.inf)
    mask = assert_equals_reference(layer, torch.randn(BATCH, LENGTH, HIDDEN))
    assert mask.sum((0, 1)).tolist() == [2] * EXPERTS  # ceil(0.5 * 16 / 4)
    assert (layer.router.weight.grad.abs().sum(1) > 0).all()


def test_autocast_bfloat16_is_fp32_within_its_rounding() -> None:
    layer = make_layer(ExpertThreshold(capacity_factor=None), Phase.TRAIN)
    x = torch.randn(BATCH, LENGTH, HIDDEN)
    y, _ = layer(x)
    exact = layer.record
    with torch.autocast("cpu", torch.bfloat16):
        y_bfloat16, _ = layer(x)
    assert y_bfloat16.dtype == torch.bfloat16
    assert layer.record.logits.dtype == torch.float32
    assert torch.equal(layer.record.logits, exact.logits)  # not only the type: nothing was rounded on the way
    assert torch.equal(layer.record.selection.mask, exact.selection.mask)
    error = (y_bfloat16.float() - y).abs().max() / y.abs().max()
    assert 0 < error < 4 * 2**-8  # two matmuls, an activation, a gate and a sum, each of relative error 2^-9


@pytest.mark.parametrize("convert", ["bfloat16", "half", "double"])
@pytest.mark.parametrize("router", ["linear", "cosine"])
def test_router_and_state_survive_conversion_bit_for_bit(convert: str, router: str) -> None:
    layer = make_layer(ExpertThreshold(), Phase.TRAIN, router=router)
    layer.state["threshold"].normal_()
    layer.router(torch.randn(1, 1, HIDDEN)).sum().backward()  # a gradient is converted along
    before = {name: t.clone() for name, t in [*layer.router.named_parameters(), *layer.state.named_buffers()]}
    gradient = layer.router.weight.grad.clone()
    getattr(layer, convert)()
    assert layer.experts.up.dtype != torch.float32
    after = dict([*layer.router.named_parameters(), *layer.state.named_buffers()])
    assert {"weight", "threshold", "cutoff"} <= after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert torch.equal(layer.router.weight.grad, gradient)
    x = torch.randn(1, 3, HIDDEN, dtype=layer.experts.up.dtype)
    assert layer.router(x).dtype == torch.float32
    y, _ = layer(x)
    assert y.dtype == x.dtype


def test_state_comes_back_from_the_meta_device() -> None:
    rule = ExpertThreshold()
    state = RoutingState(rule, 4, 1).to("meta").to_empty(device="cpu")
    state.reset_parameters()
    for name, value in rule.initial_state(4, 1).items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], value)


def test_floating_state_must_be_float32() -> None:
    class Rounded(TokenChoice):
        def initial_state(self, num_experts: int, num_experts_per_token: float) -> dict[str, Tensor]:
            return {"bias": torch.zeros(num_experts, dtype=torch.bfloat16)}

    with pytest.raises(TypeError, match=r"'bias' is torch\.bfloat16"):
        RoutingState(Rounded(), 4, 1)


@pytest.mark.parametrize(("rule", "phase"), RULES_AND_PHASES, ids=name_of)
def test_forward_leaves_the_state_alone_and_a_detached_record(rule: RoutingRule, phase: Phase) -> None:
    layer = make_layer(rule, phase)
    before = {name: buffer.clone() for name, buffer in layer.state.named_buffers()}
    y, aux_loss = layer(torch.randn(BATCH, LENGTH, HIDDEN, requires_grad=True))
    y.sum().backward()
    for name, buffer in layer.state.named_buffers():
        assert torch.equal(buffer, before[name])
    assert layer.record.logits.grad_fn is None
    assert layer.record.logits.shape == (BATCH, LENGTH, EXPERTS)
    assert (aux_loss is None) or layer.training
    assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()} | {
        f"state.{name}" for name in before
    }


def test_a_rule_of_a_third_party_is_one_class() -> None:
    """Only `select` is needed: here, even tokens to expert 0 and odd ones to experts 1 and 2."""

    class Parity(RoutingRule):
        def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
            mask = torch.zeros_like(logits, dtype=torch.bool)
            mask[:, ::2, 0] = True
            mask[:, 1::2, 1:3] = True
            return Selection(mask)

    layer = make_layer(Parity(), Phase.TRAIN)
    x = torch.randn(BATCH, LENGTH, HIDDEN)
    y, _ = layer(x)
    exact = ReferenceMoE.of(layer).forward(x.double(), layer.record.selection.mask, "sigmoid", False)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
