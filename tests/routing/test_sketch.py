"""The sketch of each expert's scores, and the dial that reads it, against the quantiles of the scores themselves."""

import numpy as np
import pytest
import torch
from helpers.foreign_module import ForeignModule, global_batches, make_trainer, micro_batches, tiny_config
from torch import Tensor

from lightning_moe.callbacks import RoutingStateUpdate
from lightning_moe.errors import UserError
from lightning_moe.model import Decoder, DecoderConfig, MoELayer, inference_num_experts_per_token
from lightning_moe.routing import ExpertChoice, ExpertThreshold, Phase, RoutingRule, TokenChoice, TokenChoiceLossFree
from lightning_moe.routing.base import RoutingRecord
from lightning_moe.routing.sketch import sketch_rates, threshold_at
from lightning_moe.routing.statistics import micro_batch_statistics, pool_statistics

EXPERTS = 8


def updated_layer(rule: RoutingRule, batches: list[Tensor], per_token: float = 1) -> MoELayer:
    """A layer whose state has seen global batches of logits [1, N, E]."""
    layer = MoELayer(DecoderConfig(hidden_size=4, num_attention_heads=1, num_experts=EXPERTS), rule, per_token)
    for logits in batches:
        layer.record = RoutingRecord(logits, rule.select(logits, layer.state, Phase.CAUSAL))
        parts = [{"layer": micro_batch_statistics(layer.record, layer.state)}]
        rule.update(layer.state, pool_statistics({"layer": layer.state}, parts)["layer"])
    return layer


def test_rates_are_factors_of_two_around_the_target_and_below_one() -> None:
    assert sketch_rates(1 / 16) == (1 / 128, 1 / 64, 1 / 32, 1 / 8, 1 / 4, 1 / 2)
    assert sketch_rates(1 / 2) == (1 / 16, 1 / 8, 1 / 4)
    assert sketch_rates(1.0) == (1 / 8, 1 / 4, 1 / 2)


@pytest.mark.parametrize("rule", [ExpertThreshold(ema_decay=0.8), ExpertChoice(ema_decay=0.8)])
def test_each_row_is_the_average_of_the_pooled_kth_largest(rule: RoutingRule) -> None:
    batches = [torch.randn(1, 128, EXPERTS) * scale for scale in (1.0, 2.0, 0.5)]
    layer = updated_layer(rule, batches)
    for row, rate in zip(layer.state["sketch"], sketch_rates(1 / EXPERTS), strict=True):
        average, weight = np.zeros(EXPERTS), 0.0
        for logits in batches:
            cutoff = np.sort(logits[0].double().numpy(), axis=0)[::-1][round(128 * rate) - 1]
            average, weight = 0.8 * average + 0.2 * cutoff, 0.8 * weight + 0.2
        np.testing.assert_allclose(row, average / weight, rtol=1e-5)


@pytest.mark.parametrize("estimator", ["kth_largest", "gaussian"])
@pytest.mark.parametrize("per_token", [1 / 8, 0.5, 0.7, 1, 1.3, 2, 3, 4])
def test_thresholds_at_other_rates_let_that_many_through(estimator: str, per_token: float) -> None:
    """Normal scores of any mean and width: between the rows of the sketch too."""
    logits = torch.randn(1, 200_000, EXPERTS) * torch.linspace(0.1, 5, EXPERTS) + torch.linspace(-3, 3, EXPERTS)
    layer = updated_layer(ExpertThreshold(estimator=estimator), [logits])  # type: ignore[arg-type]
    usage = (logits[0] > threshold_at(layer.state, per_token)).double().mean(0) * EXPERTS
    np.testing.assert_allclose(usage, per_token, rtol=0.03)


def test_skewed_scores_are_exact_at_the_rows_and_close_between() -> None:
    """Between the rows the interpolated quantile of exponential scores is off by at most 1.6, 2.3 and 4.0 percent."""
    logits = torch.empty(1, 200_000, EXPERTS).exponential_()
    layer = updated_layer(ExpertThreshold(), [logits])
    for per_token, tolerance in [(0.5, 1e-4), (2, 1e-4), (0.7, 0.025), (1.4, 0.03), (3, 0.045)]:
        usage = (logits[0] > threshold_at(layer.state, per_token)).double().mean(0) * EXPERTS
        np.testing.assert_allclose(usage, per_token, rtol=tolerance)


def trained(rule: RoutingRule) -> ForeignModule:
    module = ForeignModule(rule)
    make_trainer([RoutingStateUpdate()]).fit(module, micro_batches(global_batches(10)))
    return module.eval()


def fanouts(decoder: Decoder) -> list[float]:
    with torch.no_grad():
        decoder(torch.cat([batch["input_ids"] for batch in global_batches(10)]))
    return [layer.record.selection.mask.sum(-1).double().mean().item() for layer in decoder.moe_layers()]


@pytest.mark.parametrize("rule", [ExpertThreshold(ema_decay=0.8), ExpertChoice(ema_decay=0.8)])
def test_the_dial_turns_compute_up_and_down_and_back(rule: RoutingRule) -> None:
    decoder = trained(rule).network
    as_trained, state = fanouts(decoder), {name: buffer.clone() for name, buffer in decoder.named_buffers()}
    with inference_num_experts_per_token(decoder, 0.5):
        halved = fanouts(decoder)
    with inference_num_experts_per_token(decoder, [0.5, 2]):
        mixed = fanouts(decoder)
    with inference_num_experts_per_token(decoder, 1):
        assert fanouts(decoder) == as_trained
    assert mixed[0] == halved[0]
    for half, whole in zip(halved, as_trained, strict=True):
        assert half == pytest.approx(whole / 2, rel=0.25)  # ten small batches: an average, not the text itself
    assert mixed[1] > 1.6 * as_trained[1]
    assert fanouts(decoder) == as_trained
    assert all(torch.equal(buffer, state[name]) for name, buffer in decoder.named_buffers())


@pytest.mark.parametrize("rule", [TokenChoice(), TokenChoiceLossFree()])
def test_the_dial_of_token_choice_is_another_k(rule: RoutingRule) -> None:
    decoder = trained(rule).network
    with inference_num_experts_per_token(decoder, 3):
        assert fanouts(decoder) == [3, 3]
    assert fanouts(decoder) == [1, 1]
    with (
        pytest.raises(UserError, match=r"num_experts_per_token=0\.5.*whole number"),
        inference_num_experts_per_token(decoder, 0.5),
    ):
        pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.1, r"num_experts_per_token=0\.1: the checkpoint's sketch .* reaches from 0\.125 to 2"),
        (4, "reaches from 0.125 to 2; for another number use `calibrate`"),
        (0, "must be above 0 and at most 4"),
        (5, "must be above 0 and at most 4"),
        ([1, 1, 1], r"one number, or one for each of the 2 MoE layers"),
    ],
)
def test_what_the_dial_refuses_leaves_the_state_alone(value: object, message: str) -> None:
    decoder = trained(ExpertThreshold()).network
    state = {name: buffer.clone() for name, buffer in decoder.named_buffers()}
    with pytest.raises(UserError, match=message), inference_num_experts_per_token(decoder, value):  # type: ignore[arg-type]
        pass
    assert all(torch.equal(buffer, state[name]) for name, buffer in decoder.named_buffers())


def test_a_rule_without_a_dial_and_the_dense_model_say_so() -> None:
    class Fixed(TokenChoice):
        set_inference_num_experts_per_token = RoutingRule.set_inference_num_experts_per_token

    for rule, message in (
        (Fixed(), "Fixed was trained for 1 and cannot route to another number"),
        (None, "dense model"),
    ):
        with pytest.raises(UserError, match=message), inference_num_experts_per_token(Decoder(tiny_config(), rule), 2):
            pass
