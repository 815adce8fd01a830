"""Gates, co-activation, fanout against loss: against loops over tokens, and with effects that were planted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from observations import EXPERTS, LAYERS, random_observation, tokens_of

from lightning_moe.analysis import coactivation, fanout_loss, gates
from lightning_moe.analysis.coactivation import Coactivation
from lightning_moe.analysis.fanout_loss import FanoutLoss
from lightning_moe.analysis.gates import NUM_BINS, Gates
from lightning_moe.analysis.observe import Observation
from lightning_moe.report.figures import png

NAMES = ["layer_01", "layer_02"]
seeds = st.lists(st.integers(0, 2**31), min_size=1, max_size=3, unique=True)


def with_experts(seen: Observation, experts: torch.Tensor) -> Observation:
    return replace(seen, experts=experts, gates=torch.where(experts, seen.logits.softmax(-1), 0.0))


@settings(max_examples=15)
@given(seeds=seeds, scale=st.sampled_from([1.0, 2.5]))
def test_gates_of_each_rank(seeds: list[int], scale: float) -> None:
    seen = [random_observation(seed, share=0.6) for seed in seeds]
    seen = [replace(o, gates=o.gates * scale) for o in seen]
    result = Gates(LAYERS, EXPERTS)
    for observation in seen:
        result.update(observation)
    first = [[g for g in layer if g] for t in tokens_of(seen[:1]) for layer in t["gates"]]
    tops = [max(1.0, *map(max, filter(None, first)))] * EXPERTS + [max(1.0, *map(sum, first))]
    for layer in range(LAYERS):
        values: list[list[float]] = [[] for _ in range(EXPERTS + 1)]
        for t in tokens_of(seen):
            chosen = [g for g, taken in zip(t["gates"][layer], t["experts"][layer], strict=True) if taken]
            for rank, gate in enumerate(sorted(chosen, reverse=True)):
                values[rank].append(gate)
            values[-1].append(sum(chosen))
        for place, mine in enumerate(values):
            assert int(result.tokens[layer, place]) == len(mine)
            assert int(result.counts[layer, place].sum()) == len(mine)
            if not mine:
                continue
            assert float(result.means()[layer, place]) == pytest.approx(np.mean(mine))
            assert float(result.std()[layer, place]) == pytest.approx(np.std(mine), abs=1e-6)
            assert result.edges(place)[-1] == pytest.approx(tops[place])
            inside = np.clip(mine, 0, np.nextafter(tops[place], 0))
            expected = np.histogram(inside, np.linspace(0, tops[place], NUM_BINS + 1))[0]
            # sums of floats may lie on the other side of an edge
            assert np.abs(expected - result.counts[layer, place].numpy()).sum() <= 2


def test_a_chosen_expert_with_gate_0_has_a_rank() -> None:
    seen = random_observation(1, padding=False)
    experts = torch.zeros_like(seen.experts)
    experts[..., 2] = True
    result = Gates(LAYERS, EXPERTS)
    result.update(replace(seen, experts=experts, gates=torch.zeros_like(seen.gates)))
    assert result.tokens[0].tolist() == [18, 0, 0, 0, 18]
    [first, _] = gates.section({"a": result}, NAMES).summary
    assert (first["rank 1, mean"], first["rank 2, mean"], first["tokens with rank 2"]) == (0.0, None, 0.0)


@settings(max_examples=15)
@given(seeds=seeds)
def test_pairs_of_experts(seeds: list[int]) -> None:
    seen = [random_observation(seed, share=0.5) for seed in seeds]
    result = Coactivation(LAYERS, EXPERTS)
    for observation in seen:
        result.update(observation)
    tokens = tokens_of(seen)
    assert result.num_tokens == len(tokens)
    shares, by_loads = result.shares(), result.by_loads()
    for layer in range(LAYERS):
        masks = [t["experts"][layer] for t in tokens]
        load = [sum(mask[e] for mask in masks) for e in range(EXPERTS)]
        for i in range(EXPERTS):
            mine = [mask for mask in masks if mask[i]]
            others = sum(sum(mask) - 1 for mask in mine)
            for j in range(EXPERTS):
                if i == j or not mine:
                    assert torch.isnan(shares[layer, i, j])
                    continue
                assert float(shares[layer, i, j]) == pytest.approx(sum(mask[j] for mask in mine) / len(mine))
                rest = sum(load) - load[i]
                if rest:
                    expected = others / len(mine) * load[j] / rest
                    assert float(by_loads[layer, i, j]) == pytest.approx(expected)


def test_two_experts_that_are_always_together_are_the_strongest_pair() -> None:
    seen = random_observation(3, batch=40, share=0.3)
    experts = seen.experts.clone()
    experts[:, :, 1, 3] = experts[:, :, 1, 1]
    result = Coactivation(LAYERS, EXPERTS)
    result.update(with_experts(seen, experts))
    assert {tuple(sorted(pair)) for pair in result.strongest(1, 2)} == {(1, 3)}
    found = coactivation.section({"a": result}, NAMES)
    assert found.summary[1]["strongest pair"] in ("1 → 3", "3 → 1")
    assert found.summary[1]["share"] == 1.0
    assert found.summary[1]["ratio"] > 1.5
    assert found.summary[0]["ratio"] < 1.5


def test_of_independent_choices_the_shares_are_those_of_the_loads() -> None:
    """A fixed number of experts, drawn without preferences: N_j / N would be 0.5, and a third is right."""
    seen = random_observation(4, batch=2000, padding=False)
    experts = torch.zeros_like(seen.experts).scatter(-1, torch.rand(seen.logits.shape).topk(2).indices, True)
    result = Coactivation(LAYERS, EXPERTS)
    result.update(with_experts(seen, experts))
    others = ~torch.eye(EXPERTS, dtype=torch.bool)
    torch.testing.assert_close(result.by_loads()[:, others], result.shares()[:, others], atol=0.03, rtol=0)
    assert float(result.by_loads()[:, others].mean()) == pytest.approx(1 / 3, abs=0.01)


def test_one_expert_per_token_has_no_pairs() -> None:
    seen = random_observation(5)
    single = torch.zeros_like(seen.experts).scatter(-1, seen.logits.argmax(-1, keepdim=True), True)
    result = Coactivation(LAYERS, EXPERTS)
    result.update(with_experts(seen, single))
    found = coactivation.section({"a": result}, NAMES)
    assert found.missing == ["a: no token takes two experts of a layer."]
    assert not found.figures
    # in one layer only: the other says so
    single[:, :, 1] = True
    result.update(with_experts(seen, single))
    found = coactivation.section({"a": result}, NAMES)
    assert not found.missing
    assert found.summary[0]["strongest pair"] is None
    png(found.figures["coactivation"])


@settings(max_examples=15)
@given(seeds=seeds)
def test_fanout_against_loss(seeds: list[int]) -> None:
    seen = [random_observation(seed, batch=6, share=0.5) for seed in seeds]
    result = FanoutLoss(LAYERS, EXPERTS)
    for observation in seen:
        result.update(observation)
    tokens = tokens_of(seen)
    losses = np.array([t["loss"] for t in tokens])
    for layer in (None, *range(LAYERS)):
        fanout = np.array([np.sum(t["experts"] if layer is None else t["experts"][layer]) for t in tokens])
        fit = result.fit(layer)
        assert fit.mean_fanout == pytest.approx(fanout.mean())
        if len(set(fanout)) == 1:
            assert (fit.r, fit.slope, fit.constant) == (None, None, True)
            continue
        assert fit.r == pytest.approx(np.corrcoef(fanout, losses)[0, 1], abs=1e-9)
        assert fit.slope == pytest.approx(np.polyfit(losses, fanout, 1)[0], abs=1e-9)
        if layer is None:
            continue
        for value in set(fanout):
            chosen = [t for t, mine in zip(tokens, fanout, strict=True) if mine == value]
            entropies = []
            for t in chosen:
                p = np.exp(t["logits"][layer]) / np.exp(t["logits"][layer]).sum()
                entropies.append(-(p * np.log(p)).sum())
            assert int(result.tokens[layer, value]) == len(chosen)
            assert float(result.loss[layer, value]) == pytest.approx(sum(t["loss"] for t in chosen), rel=1e-6)
            assert float(result.entropy[layer, value]) == pytest.approx(sum(entropies), rel=1e-5)


def test_a_router_that_knows_the_loss_is_seen() -> None:
    seen = random_observation(6, batch=30)
    level = (seen.loss / 5).long().clamp(0, EXPERTS - 1)
    experts = torch.zeros_like(seen.experts)
    experts[:, :, 0] = torch.arange(EXPERTS) <= level[..., None]  # the first layer takes 1 + ⌊loss / 5⌋ experts
    experts[:, :, 1] = torch.arange(EXPERTS) < 2
    result = FanoutLoss(LAYERS, EXPERTS)
    result.update(with_experts(seen, experts))
    found = fanout_loss.section({"a": result}, NAMES)
    everything, first, second = found.summary
    assert first["r"] > 0.95
    assert everything["R²"] == pytest.approx(first["r"] ** 2)
    # of such stairs: covariance 5 · 1.25, variance of the loss 400 / 12
    assert first["slope / experts per nat"] == pytest.approx(0.1875, abs=0.015)
    assert (second["r"], second["R²"], second["slope / experts per nat"]) == (None, None, None)
    [note] = found.missing
    assert "layer_02 (2): no correlation there" in note


def test_a_constant_fanout_says_so() -> None:
    seen = random_observation(7)
    experts = torch.zeros_like(seen.experts)
    experts[..., :2] = True
    result = FanoutLoss(LAYERS, EXPERTS)
    result.update(with_experts(seen, experts))
    found = fanout_loss.section({"a": result}, NAMES)
    assert found.missing == ["a: every token takes the same number of experts, so nothing can depend on the loss."]
    assert not found.figures
    assert all(row["r"] is None for row in found.summary)
    # equal losses: no correlation either, and no division by 0
    varying = FanoutLoss(LAYERS, EXPERTS)
    varying.update(replace(random_observation(8, padding=False, share=0.5), loss=torch.full((3, 6), 0.1)))
    assert varying.fit(0).r is None


def test_no_token_takes_an_expert() -> None:
    seen = random_observation(9)
    seen = with_experts(seen, torch.zeros_like(seen.experts))
    parts = Gates(LAYERS, EXPERTS), Coactivation(LAYERS, EXPERTS), FanoutLoss(LAYERS, EXPERTS)
    for module, part in zip((gates, coactivation, fanout_loss), parts, strict=True):
        part.update(seen)
        found = module.section({"a": part}, NAMES)
        for figure in found.figures.values():
            assert len(png(figure)) > 1000
        assert all(value == value for row in found.summary for value in row.values())  # no NaN
        assert bool(found.missing) is (module is not gates)


@pytest.mark.parametrize(("layers", "experts"), [(1, 2), pytest.param(48, 64, marks=pytest.mark.slow)])
def test_figures_of_small_and_large_models(layers: int, experts: int) -> None:
    generator = torch.Generator().manual_seed(1)
    seen = random_observation(1, batch=8)
    logits = torch.randn(*seen.tokens.shape, layers, experts, generator=generator)
    chosen = torch.rand(logits.shape, generator=generator) < 0.4
    seen = with_experts(replace(seen, logits=logits), chosen)
    names = [f"layer_{number:02d}" for number in range(layers)]
    parts = Gates(layers, experts), Coactivation(layers, experts), FanoutLoss(layers, experts)
    for module, part in zip((gates, coactivation, fanout_loss), parts, strict=True):
        part.update(seen)
        for figure in module.section({"a": part}, names).figures.values():
            assert len(png(figure)) > 1000
