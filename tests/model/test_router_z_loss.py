"""The router z-loss: mean over tokens of logsumexp(r)², under any rule, in training only."""

import numpy as np
import pytest
import torch
from helpers.routing_reference import RULES, name_of

from lightning_moe.errors import UserError
from lightning_moe.model import Decoder, DecoderConfig, MoELayer
from lightning_moe.routing import RoutingRule, TokenChoice

COEF = 0.01


def make_layer(rule: RoutingRule, router_z_loss_coef: float) -> MoELayer:
    config = DecoderConfig(hidden_size=8, num_attention_heads=1, num_experts=4, router_z_loss_coef=router_z_loss_coef)
    layer = MoELayer(config, rule, 2)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_z_loss_adds_to_the_loss_of_the_rule(rule: RoutingRule) -> None:
    layer = make_layer(rule, COEF)
    _, aux_loss = layer(torch.randn(3, 5, 8))
    assert layer.record is not None
    logits = layer.record.logits.double().numpy()
    of_rule = rule.aux_loss(layer.record.logits, layer.state)
    expected = COEF * (np.log(np.exp(logits).sum(-1)) ** 2).mean() + (0 if of_rule is None else of_rule.item())
    assert aux_loss.item() == pytest.approx(expected, rel=1e-5)


def test_it_shrinks_the_router_logits() -> None:
    layer = make_layer(TokenChoice(), COEF)
    logits = torch.randn(3, 5, 4, requires_grad=True)
    layer.aux_loss(logits).backward()
    z = logits.detach().logsumexp(-1, keepdim=True)
    torch.testing.assert_close(logits.grad, COEF * 2 * z * logits.detach().softmax(-1) / 15)


@pytest.mark.parametrize("rule", [TokenChoice()], ids=name_of)
def test_off_and_evaluation_have_none(rule: RoutingRule) -> None:
    assert make_layer(rule, 0.0)(torch.randn(1, 2, 8))[1] is None
    assert make_layer(rule, COEF).eval()(torch.randn(1, 2, 8))[1] is None


def test_the_decoder_sums_it_over_layers() -> None:
    config = DecoderConfig(
        vocab_size=16, max_sequence_length=8, hidden_size=8, num_attention_heads=1, num_experts=4,
        num_layers=3, router_z_loss_coef=COEF,
    )  # fmt: skip
    model = Decoder(config, TokenChoice())
    aux_loss = model(torch.randint(0, 16, (2, 8))).aux_loss
    expected = sum(COEF * layer.record.logits.logsumexp(-1).square().mean().item() for layer in model.moe_layers())
    assert aux_loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_negative_coefficient_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.decoder\.router_z_loss_coef=-1"):
        DecoderConfig(router_z_loss_coef=-1)
