"""The dial: equal compute for all methods, differences on the same windows, and what a method cannot serve."""

import math

import pytest
import torch
from helpers.hf_models import EXPERTS, make_model
from helpers.hf_tokenizers import VOCABULARY

from lightning_moe.calibrate import Windows
from lightning_moe.dial import METHODS, default_targets, dial, refusal, use_method
from lightning_moe.errors import UserError
from lightning_moe.hf import TransformersLM

LENGTH = 32


def lm_of(family: str) -> TransformersLM:
    return TransformersLM(make_model(family))


def two_texts(num_windows: int) -> tuple[Windows, Windows]:
    """Independent tokens: both halves are of one distribution."""
    tokens = torch.randint(1, VOCABULARY, (num_windows * LENGTH + 1,), generator=torch.Generator().manual_seed(1))
    return Windows.spread(tokens.numpy(), LENGTH, num_windows * LENGTH).split()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_all_methods_compute_equally_much_on_text_that_did_not_calibrate(family: str) -> None:
    lm, (calibration, unused) = lm_of(family), two_texts(1600)
    points = dial(lm, [1.6], calibration, unused)
    assert [(point.method, point.target) for point in points] == [
        *((method, 1.6) for method in METHODS if method != "top-k"),
        *((method, 2.0) for method in METHODS),  # as released
    ]
    for point in points:
        assert point.num_experts_per_token == pytest.approx(point.target, rel=0.02), point.method
        for fanout in point.measured.fanout:
            assert fanout == pytest.approx(1, abs=0.03), point.method
    assert [(point.method, point.target) for point in points if point.released] == [("top-k", 2)]
    by_place = {(point.method, point.target): point for point in points}
    assert by_place["balanced thresholds", 2.0].busiest < 1.2 < by_place["top-k", 2.0].busiest
    for own, kept in zip(
        by_place["top-k", 2.0].measured.usage, by_place["thresholds", 2.0].measured.usage, strict=True
    ):
        assert (own - kept).abs().max() < 0.15
    assert all(layer.routes_as_released for layer in lm.layers)


def test_numbers_are_those_of_one_pass_per_method() -> None:
    lm, (calibration, unused) = lm_of("mixtral"), two_texts(40)
    points = {point.method: point for point in dial(lm, [], calibration, unused)}
    ids = torch.cat(list(unused))
    losses = {}
    for method, point in points.items():
        use_method(lm, method, 2.0, lambda: (batch[:, :-1] for batch in calibration))
        with torch.no_grad():
            log_probabilities = lm(ids[:, :-1]).logits.double().log_softmax(-1)
        losses[method] = -log_probabilities.gather(-1, ids[:, 1:, None])[..., 0].mean(-1)  # of each window
        assert point.measured.loss == pytest.approx(losses[method].mean().item(), abs=1e-5)
        chosen = [layer.record.selection.mask for layer in lm.layers if layer.record is not None]
        pairs = sum(int(mask.sum()) for mask in chosen)
        assert point.num_experts_per_token == pytest.approx(pairs / 2 / ids[:, 1:].numel(), rel=1e-3)
        loads = [mask.sum((0, 1)).double() for mask in chosen]
        assert point.busiest == pytest.approx(max(float(load.max() / load.mean()) for load in loads), rel=2e-2)
        difference, error = point.over_top_k or (math.nan, math.nan)
        paired = losses[method] - losses["top-k"]
        assert difference == pytest.approx(paired.mean().item(), abs=1e-5)
        assert error == pytest.approx(paired.std().item() / 20**0.5, abs=1e-5)


def test_what_a_method_cannot_serve_is_left_out() -> None:
    lm = lm_of("deepseek_v3")  # a token chooses in 1 of 2 groups of 4
    assert refusal(lm, "top-k", 4) is None
    assert refusal(lm, "top-k", 5) == refusal(lm, "min-p", 4.5) == "the model chooses among 4 of its 8 experts"
    assert refusal(lm, "thresholds", EXPERTS) is refusal(lm, "thresholds", 0.2) is None
    assert "whole number" in str(refusal(lm, "top-k", 1.5))
    assert refusal(lm, "top-p", 1.5) is None
    assert "at least one" in str(refusal(lm, "top-p", 0.5))
    assert default_targets(lm) == [1, 2, 3, 4]


def test_logits_that_are_nan_are_refused() -> None:
    lm, (calibration, _) = lm_of("mixtral"), two_texts(4)
    with torch.no_grad():
        lm.layers[1].router.weight[3, 0] = torch.nan
    with pytest.raises(UserError, match="layer_01: the model computes router logits that are NaN"):
        use_method(lm, "thresholds", 1.0, lambda: (batch[:, :-1] for batch in calibration))


def test_a_pass_that_ends_at_a_router_leaves_nothing_behind() -> None:
    lm, (calibration, _) = lm_of("mixtral"), two_texts(8)
    ids = next(iter(calibration))[:, :-1]
    with torch.no_grad():
        before = lm(ids).logits
        use_method(lm, "thresholds", 1.0, lambda: (batch[:, :-1] for batch in calibration))
        for layer in lm.layers:
            layer.route_by(layer.released, layer.top_k)
        assert torch.equal(lm(ids).logits, before)


@pytest.mark.parametrize("method", ["top-k", "top-p", "min-p"])
def test_methods_that_rank_as_released_keep_the_selection_bias(method: str) -> None:
    lm, (calibration, _) = lm_of("deepseek_v3"), two_texts(8)
    own = [layer.state["selection_bias"].clone() for layer in lm.layers]
    use_method(lm, method, 2.0, lambda: (batch[:, :-1] for batch in calibration))
    for bias, layer in zip(own, lm.layers, strict=True):
        assert bias.abs().max() > 0.1
        assert torch.equal(layer.state["selection_bias"], bias)
