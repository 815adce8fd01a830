"""Calibration against quantiles found by sorting, and what each kind of checkpoint becomes."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers.foreign_module import tiny_config
from torch import Tensor

from lightning_moe.calibrate import calibrate, measure, target_model
from lightning_moe.errors import UserError
from lightning_moe.model import Decoder, DecoderConfig
from lightning_moe.module import LanguageModel
from lightning_moe.routing import (
    ExpertChoice,
    ExpertThreshold,
    QuantileBalancing,
    RoutingRule,
    TokenChoice,
    TokenChoiceLossFree,
)
from lightning_moe.routing.sketch import sketch_rates

VOCABULARY, LENGTH = 32, 16


def random_decoder(rule: RoutingRule | None, **options: object) -> Decoder:
    torch.manual_seed(3)
    decoder = Decoder(tiny_config(**options), rule)
    for name, parameter in decoder.named_parameters():
        torch.nn.init.normal_(parameter, std=1.0 if "embedding" in name or "router" in name else 0.2)
    return decoder.eval()


def text(num_windows: int, seed: int) -> Tensor:
    """Independent random tokens: windows of one distribution."""
    return torch.randint(0, VOCABULARY, (num_windows, LENGTH + 1), generator=torch.Generator().manual_seed(seed))


def batches(windows: Tensor) -> list[Tensor]:
    return [batch[:, :-1] for batch in windows.split(7)]


@pytest.mark.parametrize("rule", [ExpertThreshold(), ExpertChoice(estimator="gaussian")])
@pytest.mark.parametrize("per_token", [1, [0.5, 2]])
def test_thresholds_are_the_sorted_scores_layer_by_layer(rule: RoutingRule, per_token: object) -> None:
    """The second layer's scores are those after a first layer that already has its new thresholds."""
    decoder = random_decoder(rule, num_experts_per_token=per_token)
    windows = text(50, 0)
    calibrate(decoder, lambda: batches(windows))
    with torch.no_grad():
        decoder(windows[:, :-1])  # all at once
    for layer in decoder.moe_layers():
        scores = np.sort(layer.record.logits.flatten(0, 1).numpy(), axis=0)[::-1]
        k = round(50 * LENGTH * layer.state.rate)
        np.testing.assert_allclose(layer.state["threshold"], scores[k - 1], rtol=1e-5)
        assert layer.record.selection.mask.sum((0, 1)).tolist() == pytest.approx([k] * 4, abs=2)  # the rounding of 7s
        for row, rate in zip(layer.state["sketch"], sketch_rates(layer.state.rate), strict=True):
            np.testing.assert_allclose(row, scores[int(50 * LENGTH * rate + 0.5) - 1], rtol=1e-5)
        assert layer.state["ema_weight"] == 1


@pytest.mark.parametrize("source", [ExpertThreshold(), ExpertChoice(), TokenChoice(), QuantileBalancing(), None])
def test_usage_on_text_of_the_same_kind_is_within_five_percent(source: RoutingRule | None) -> None:
    module = LanguageModel(tiny_config(), source)
    module.decoder.load_state_dict(random_decoder(source).state_dict())
    target = target_model(dict(module.hparams), module.state_dict())
    calibrate(target.model.decoder, lambda: batches(text(4000, 0)))
    found = measure(target.model.decoder, text(4000, 1).split(50))
    assert found.num_tokens == 4000 * LENGTH
    assert len(found.worst) == 2
    assert max(found.worst) < 0.05


def test_the_measured_loss_and_loads_are_those_of_one_pass() -> None:
    decoder, windows = random_decoder(TokenChoice()), text(10, 2)
    found = measure(decoder, windows.split(3))
    with torch.no_grad():
        logits = decoder(windows[:, :-1]).logits.double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert found.loss == pytest.approx(expected.item(), abs=1e-5)
    assert found.fanout == [1, 1]
    for usage, layer in zip(found.usage, decoder.moe_layers(), strict=True):
        share = layer.record.selection.mask.double().mean((0, 1)) * 4
        torch.testing.assert_close(usage, share)


def module_of(rule: RoutingRule | None, **options: object) -> LanguageModel:
    torch.manual_seed(4)
    module = LanguageModel(tiny_config(**options), rule)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


@pytest.mark.parametrize("rule", [TokenChoice(), TokenChoiceLossFree(), QuantileBalancing()])
def test_token_choice_becomes_expert_threshold_with_the_same_weights(rule: RoutingRule) -> None:
    module = module_of(rule)
    target = target_model(dict(module.hparams), module.state_dict())
    assert isinstance(next(target.model.decoder.moe_layers()).rule, ExpertThreshold)
    assert target.same_parameters
    ours, theirs = dict(module.named_parameters()), dict(target.model.named_parameters())
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_another_rate_keeps_the_rule_the_weights_and_the_size_of_the_dense_layer() -> None:
    module = module_of(ExpertChoice(ema_decay=0.5))
    target = target_model(dict(module.hparams), module.state_dict(), [0.5, 2])
    layers = list(target.model.decoder.moe_layers())
    assert [layer.state.num_experts_per_token for layer in layers] == [0.5, 2]
    assert layers[0].rule == ExpertChoice(ema_decay=0.5)
    assert target.hyper_parameters["decoder"]["dense_hidden_size"] == 2 * 8
    again = LanguageModel.from_hyperparameters(target.hyper_parameters)
    again.load_state_dict(target.model.state_dict())
    calibrate(target.model.decoder, lambda: batches(text(500, 0)))
    assert measure(target.model.decoder, text(500, 0).split(50)).fanout == pytest.approx([1, 1], abs=0.01)


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@pytest.mark.parametrize(("shared", "per_token"), [(1, 1), (1, 2), (0, 2)])
def test_slices_of_the_dense_network_add_up_to_it(activation: str, shared: int, per_token: int) -> None:
    """Shared expert + one copy of every slice, each with gate 1, is the dense network."""
    options = {"activation": activation, "num_shared_experts": shared, "num_experts_per_token": per_token}
    module = module_of(None, **options)
    target = target_model(dict(module.hparams), module.state_dict())
    assert not target.same_parameters
    x = torch.randn(9, 16)
    for block, upcycled in zip(module.decoder.blocks[1:], target.model.decoder.blocks[1:], strict=True):
        mask = torch.zeros(9, 4, dtype=torch.bool)
        mask[:, :per_token] = True
        with torch.no_grad():
            expected = block.feed_forward(x)
            y = upcycled.moe.experts(x, mask, torch.ones(9, 4))
            other = upcycled.moe.experts(x, mask.roll(per_token, dims=1), torch.ones(9, 4))  # the next copies
            if shared:
                y, other = y + upcycled.moe.shared_expert(x), other + upcycled.moe.shared_expert(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-4)
    for name, parameter in module.decoder.blocks[0].named_parameters():
        assert torch.equal(parameter, target.model.decoder.blocks[0].get_parameter(name))


def test_upcycled_routers_are_seeded_and_of_unit_logits() -> None:
    module = module_of(None, router="cosine")
    one, same, other = (target_model(dict(module.hparams), module.state_dict(), seed=seed).model for seed in (1, 1, 2))
    routers = [next(model.decoder.moe_layers()).router for model in (one, same, other)]
    assert torch.equal(routers[0].weight, routers[1].weight)
    assert not torch.equal(routers[0].weight, routers[2].weight)
    assert routers[0].scale.item() == 4


@pytest.mark.parametrize(
    ("rule", "options", "rate", "message"),
    [
        (None, {}, 2.0, "upcycle it first"),
        (None, {"num_experts_per_token": 1.5}, None, r"num_experts_per_token=1\.5, .* whole routed experts"),
        (None, {"dense_hidden_size": 40}, None, "dense_hidden_size=40"),
        (None, {"num_dense_layers": 3}, None, "all 3 layers stay dense"),
        (ExpertThreshold(), {}, 5.0, r"num_experts_per_token=5\.0: must be above 0 and at most num_experts=4"),
        (ExpertThreshold(), {}, [1.0], "one number, or one for each of the 2 MoE layers"),
    ],
)
def test_what_does_not_fit_is_refused(rule: RoutingRule | None, options: dict, rate: object, message: str) -> None:
    module = module_of(rule, **options)
    with pytest.raises(UserError, match=message):
        target_model(dict(module.hparams), module.state_dict(), rate)  # type: ignore[arg-type]


def test_a_rule_of_ones_own_is_refused() -> None:
    module = module_of(Own())
    with pytest.raises(UserError, match="routing=Own: there is nothing to calibrate"):
        target_model(dict(module.hparams), module.state_dict())


@dataclass(frozen=True)
class Own(RoutingRule):
    """A rule that declares nothing."""

    def select(self, logits: Tensor, state: object, phase: object) -> object:
        raise NotImplementedError


def test_dense_size_follows_the_experts_unless_given() -> None:
    assert DecoderConfig(hidden_size=8, num_attention_heads=1).dense_size(1) == 2 * 16
    assert DecoderConfig(hidden_size=8, num_attention_heads=1, dense_hidden_size=5).dense_size(1) == 5
    with pytest.raises(UserError, match="dense_hidden_size=0"):
        DecoderConfig(dense_hidden_size=0)
