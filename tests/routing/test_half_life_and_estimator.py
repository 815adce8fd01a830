"""The moving average with any decays, half-lives in tokens, and Gaussian cutoffs, against float64 formulas."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.gloo_pair import GlooPair
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.model import DecoderConfig, MoELayer
from lightning_moe.routing import (
    ExpertChoice,
    ExpertThreshold,
    Phase,
    PooledStatistics,
    QuantileBalancing,
    RoutingRule,
    RoutingState,
    rule_from_config,
)
from lightning_moe.routing.base import RoutingRecord
from lightning_moe.routing.statistics import micro_batch_statistics, pool_statistics

NUM_EXPERTS = 4


def updated_threshold(rule: RoutingRule, cutoffs: list[float], num_tokens: list[int]) -> float:
    state = RoutingState(rule, 1, 1)
    for cutoff, tokens in zip(cutoffs, num_tokens, strict=True):
        value = torch.tensor([cutoff])
        sketch = value.repeat(len(state["sketch"]), 1)
        rule.update(state, PooledStatistics(torch.tensor(tokens), torch.tensor([1]), value, sketch))
    return state["threshold"].item()


@given(
    st.lists(st.tuples(st.floats(-8, 8, width=32), st.integers(1, 4096)), min_size=1, max_size=30),
    st.integers(1, 20_000),
)
def test_bias_correction_stays_right_when_the_decay_varies(steps: list[tuple[float, int]], half_life: int) -> None:
    """The paper's average from 0, over 1 − the product of the decays, in float64."""
    raw, product = 0.0, 1.0
    for cutoff, tokens in steps:
        decay = 0.5 ** (tokens / half_life)
        raw, product = decay * raw + (1 - decay) * cutoff, product * decay
    threshold = updated_threshold(ExpertThreshold(ema_half_life_tokens=half_life), *map(list, zip(*steps, strict=True)))
    assert threshold == pytest.approx(raw / (1 - product), abs=1e-4)


def test_a_half_life_is_a_decay_for_batches_of_one_size() -> None:
    cutoffs = [0.5, -1.0, 2.0, 2.5]
    half_life = updated_threshold(ExpertThreshold(ema_half_life_tokens=1000), cutoffs, [250] * 4)
    assert half_life == pytest.approx(updated_threshold(ExpertThreshold(ema_decay=0.5**0.25), cutoffs, [7] * 4))


def test_the_shipped_half_life_is_the_quickstarts_decay() -> None:
    conf = Path(__file__).parents[2] / "conf" / "routing"
    half_life, decay = (
        rule_from_config(yaml.safe_load((conf / f"{name}.yaml").read_text())["model"]["routing"])
        for name in ("expert_threshold_half_life", "expert_threshold")
    )
    assert isinstance(half_life, ExpertThreshold)
    assert isinstance(decay, ExpertThreshold)
    assert float(half_life.decay(torch.tensor(16 * 256))) == pytest.approx(decay.ema_decay, abs=1e-6)
    assert half_life.capacity_factor == decay.capacity_factor


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_memory_counts_tokens_not_steps(steps: int) -> None:
    """After tokens of one half-life the first value weighs half as much, in however many steps they came."""
    threshold = updated_threshold(
        ExpertThreshold(ema_half_life_tokens=1000), [1.0] + [0.0] * steps, [3000] + [1000 // steps] * steps
    )
    first = 1 - 0.5**3
    assert threshold == pytest.approx(0.5 * first / (1 - 0.5 * (1 - first)), rel=1e-5)


def test_half_the_learning_tokens_double_the_weight_of_old_thresholds() -> None:
    moves = [
        updated_threshold(ExpertThreshold(ema_half_life_tokens=h), [0.0, 1.0], [10**9, 64]) for h in (2000, 4000, 8000)
    ]
    for shorter, longer in pairwise(moves):
        assert shorter / longer == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("rule_class", [ExpertThreshold, ExpertChoice, QuantileBalancing])
def test_decay_and_half_life_together_are_refused(rule_class: type) -> None:
    with pytest.raises(UserError, match=r"ema_decay=0\.5 and ema_half_life_tokens=100: give one of the two"):
        rule_class(ema_decay=0.5, ema_half_life_tokens=100)
    rule_class(ema_half_life_tokens=100)
    for half_life in (0, -5):
        with pytest.raises(UserError, match=f"ema_half_life_tokens={half_life}"):
            rule_class(ema_half_life_tokens=half_life)
    for decay in (1.0, -0.1, math.nan):
        with pytest.raises(UserError, match=r"model\.routing\.ema_decay="):
            rule_class(ema_decay=decay)


def pooled_cutoff(rule: RoutingRule, micro_batches: list[Tensor], per_token: float) -> Tensor:
    """The cutoff of a global batch of logits [B, S, E], through the layer and the callback's pooling."""
    config = DecoderConfig(hidden_size=4, num_attention_heads=1, num_experts=NUM_EXPERTS)
    layer = MoELayer(config, rule, per_token)
    observations = []
    for logits in micro_batches:
        layer.record = RoutingRecord(logits, rule.select(logits, layer.state, Phase.TRAIN))
        observations.append({"layer": micro_batch_statistics(layer.record, layer.state)})
    cutoff = pool_statistics({"layer": layer.state}, observations)["layer"].cutoff
    assert cutoff is not None
    return cutoff


def share_of_normal_above(z: float) -> float:
    return 0.5 * math.erfc(z / math.sqrt(2))


@pytest.mark.parametrize("rule", [ExpertThreshold(estimator="gaussian"), ExpertChoice(estimator="gaussian")])
@pytest.mark.parametrize("per_token", [0.25, 1, 2, 3.5])
def test_gaussian_cutoff_is_mean_plus_z_standard_deviations(rule: RoutingRule, per_token: float) -> None:
    logits = torch.randn(3, 50, NUM_EXPERTS) * torch.tensor([0.1, 1.0, 3.0, 1.0]) + torch.tensor([0.0, -2.0, 1.0, 1e3])
    exact = logits.flatten(0, 1).double().numpy()
    z = (pooled_cutoff(rule, [logits], per_token).double().numpy() - exact.mean(0)) / exact.std(0)
    for value in z[:3]:
        assert share_of_normal_above(value) == pytest.approx(per_token / NUM_EXPERTS, abs=1e-5)
    assert share_of_normal_above(z[3]) == pytest.approx(per_token / NUM_EXPERTS, abs=1e-4)  # fp32 ends at 1000 ± 3e-5


def test_equal_scores_and_a_rate_of_one_have_a_finite_gaussian_cutoff() -> None:
    rule = ExpertThreshold(estimator="gaussian")
    assert pooled_cutoff(rule, [torch.full((1, 9, NUM_EXPERTS), 0.1)], 1).tolist() == pytest.approx([0.1] * 4)
    assert pooled_cutoff(rule, [torch.randn(1, 9, NUM_EXPERTS)], NUM_EXPERTS).isfinite().all()


def test_the_split_over_ranks_and_steps_does_not_matter(gloo_pair: GlooPair) -> None:
    rule = ExpertThreshold(estimator="gaussian")
    logits = torch.randn(8, 33, NUM_EXPERTS) + 5
    whole = pooled_cutoff(rule, [logits], 1)
    args = [(rule, list(part.split(2)), 1) for part in logits.split(4)]
    for cutoff in gloo_pair.run(pooled_cutoff, args):
        torch.testing.assert_close(
            cutoff, whole, rtol=1e-7, atol=0
        )  # the order of fp64 sums: at most the last fp32 bit


def test_the_gaussian_estimate_is_exact_for_normal_logits_and_biased_for_skewed_ones() -> None:
    """Exponential logits at rate 1/4: mean + z·std = 1.674 leaves 18.7% above, ln 4 = 1.386 would leave 25%."""
    normal, skewed = torch.randn(1, 200_000, NUM_EXPERTS), torch.empty(1, 200_000, NUM_EXPERTS).exponential_()
    share = [
        (logits > pooled_cutoff(ExpertThreshold(estimator="gaussian"), [logits], 1)).double().mean().item()
        for logits in (normal, skewed)
    ]
    assert share == pytest.approx([0.25, math.exp(-1.67449)], abs=3e-3)


def collectives(rule: RoutingRule) -> int:
    import torch.distributed as dist

    count, all_reduce = 0, dist.all_reduce

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counted
    try:
        pooled_cutoff(rule, [torch.randn(1, 8, NUM_EXPERTS)], 1)
    finally:
        dist.all_reduce = all_reduce
    return count


def test_moments_travel_with_the_counts(gloo_pair: GlooPair) -> None:
    assert gloo_pair.run(collectives, [(ExpertThreshold(estimator="gaussian"),)] * 2) == [1, 1]
    assert gloo_pair.run(collectives, [(ExpertThreshold(),)] * 2) == [5, 5]  # counts, and four for the exact k-th


def test_another_estimator_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.routing\.estimator='median'"):
        ExpertThreshold(estimator="median")  # type: ignore[arg-type]


def test_exact_is_the_default() -> None:
    logits = torch.randn(1, 64, NUM_EXPERTS)
    expected = np.sort(logits[0].numpy(), axis=0)[::-1][15]
    np.testing.assert_array_equal(pooled_cutoff(ExpertThreshold(), [logits], 1).numpy(), expected)
