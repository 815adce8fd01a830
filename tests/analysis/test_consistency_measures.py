"""Consistency against distributions and sets written out token by token, with the empty conventions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.analysis.consistency import Consistency, token_measures

sets = st.sets(st.integers(0, 5))


def mask(edges: set[int]) -> torch.Tensor:
    return torch.tensor([[edge in edges for edge in range(6)]])


def reference(a: set[int], b: set[int]) -> dict[str, float]:
    if not a and not b:
        return {"jaccard": 1.0, "dice": 1.0, "jsd": 0.0, "tv": 0.0}
    if not a or not b:
        return {"jaccard": 0.0, "dice": 0.0, "jsd": 1.0, "tv": 1.0}
    p = {edge: 1 / len(a) for edge in a}
    q = {edge: 1 / len(b) for edge in b}
    middle = {edge: (p.get(edge, 0) + q.get(edge, 0)) / 2 for edge in a | b}
    kl = lambda d: sum(value * math.log2(value / middle[edge]) for edge, value in d.items())  # noqa: E731
    return {
        "jaccard": len(a & b) / len(a | b),
        "dice": 2 * len(a & b) / (len(a) + len(b)),
        "jsd": (kl(p) + kl(q)) / 2,
        "tv": sum(abs(p.get(edge, 0) - q.get(edge, 0)) for edge in a | b) / 2,
    }


@given(a=sets, b=sets)
def test_token_measures_are_those_of_the_written_out_distributions(a: set[int], b: set[int]) -> None:
    measures = {name: float(value) for name, value in token_measures(mask(a), mask(b)).items()}
    assert measures == pytest.approx(reference(a, b), abs=1e-12)
    assert all(0 <= value <= 1 for value in measures.values())


def test_empty_conventions() -> None:
    nothing, one, other = mask(set()), mask({1}), mask({2})
    assert [float(v) for v in token_measures(nothing, nothing).values()] == [1, 1, 0, 0]
    assert [float(v) for v in token_measures(nothing, one).values()] == [0, 0, 1, 1]
    assert [float(v) for v in token_measures(one, nothing).values()] == [0, 0, 1, 1]
    assert [float(v) for v in token_measures(one, other).values()] == [0, 0, 1, 1]
    assert [float(v) for v in token_measures(one, one).values()] == [1, 1, 0, 0]


@given(seed=st.integers(0, 2**31), share=st.sampled_from([0.0, 0.15, 0.6]), cut=st.integers(1, 4))
def test_sums_over_batches_are_those_of_all_edges(seed: int, share: float, cut: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(5, 3, 2, 3, generator=generator) < share for _ in range(2))  # [B, S, L, E]
    valid = torch.rand(5, 3, generator=generator) < 0.8
    valid[0, 0] = True
    consistency = Consistency(2, 3)
    for part in (slice(0, cut), slice(cut, 5)):
        consistency.update(a[part], b[part], valid[part])
    per_layer, joint = consistency.result()

    tokens = [(i, j) for i in range(5) for j in range(3) if valid[i, j]]
    for layers, got in (*(([layer], per_layer[layer]) for layer in range(2)), ([0, 1], joint)):
        edges = [
            {(t, layer, e) for t in tokens for layer in layers for e in range(3) if z[t][layer, e]} for z in (a, b)
        ]
        union, both = len(edges[0] | edges[1]), len(edges[0] & edges[1])
        assert got.weighted_jaccard == pytest.approx(both / union if union else 1.0)
        total = len(edges[0]) + len(edges[1])
        assert got.weighted_dice == pytest.approx(2 * both / total if total else 1.0)
        for mine, share in zip(edges, (got.of_first, got.of_second), strict=True):
            assert share == pytest.approx(both / len(mine) if mine else float(total == 0))
        of_tokens = [
            reference(*({(layer, e) for layer in layers for e in range(3) if z[t][layer, e]} for z in (a, b)))
            for t in tokens
        ]
        for name in ("jaccard", "dice", "jsd", "tv"):
            assert getattr(got, name) == pytest.approx(sum(m[name] for m in of_tokens) / len(tokens))
        assert got.num_tokens == len(tokens)


def test_chance_is_what_independent_routers_reach() -> None:
    generator = torch.Generator().manual_seed(1)
    rates = torch.tensor([0.05, 0.2, 0.5])
    a, b = (torch.rand(400, 100, 1, 3, generator=generator) < rates for _ in range(2))
    consistency = Consistency(1, 3)
    consistency.update(a, b, torch.ones(400, 100, dtype=torch.bool))
    joint = consistency.result()[1]
    assert joint.weighted_jaccard == pytest.approx(joint.chance_jaccard, rel=0.03)
    assert joint.chance_jaccard == pytest.approx(float((rates**2).sum() / (2 * rates - rates**2).sum()), rel=0.02)
    assert joint.of_first == pytest.approx(joint.chance_of_first, rel=0.03)
    assert joint.chance_of_second == pytest.approx(float((rates**2).sum() / rates.sum()), rel=0.02)
    same = Consistency(1, 3)
    same.update(a, a, torch.ones(400, 100, dtype=torch.bool))
    assert same.result()[1].weighted_jaccard == 1.0
    assert same.result()[1].jsd == 0.0
