"""Top-p and min-p against loops over tokens and experts, and their parameters against a sort of all scores."""

import pytest
import torch
from torch import Tensor

from lightning_moe.hf.mass_rules import MassRule, MinP, TopP
from lightning_moe.hf.released import ReleasedTopK
from lightning_moe.routing import Phase, RoutingState
from lightning_moe.routing.streamed import streamed_kth_largest

EXPERTS = 8
RELEASED = [
    ReleasedTopK("softmax"),
    ReleasedTopK("sigmoid"),
    ReleasedTopK("sigmoid", num_groups=4, num_kept_groups=2, group_score="top2"),
]


def state_of(rule: MassRule, p: float | None = None) -> RoutingState:
    state = RoutingState(rule, EXPERTS, 2)
    if rule.released.score == "sigmoid":
        state["selection_bias"].copy_(torch.linspace(-0.3, 0.3, EXPERTS))
    if p is not None:
        state["p"].fill_(p)
    return state


def some_logits() -> Tensor:
    return 1.5 * torch.randn(5, 40, EXPERTS, generator=torch.Generator().manual_seed(2))


def probabilities(logits: Tensor, rule: MassRule, bias: list[float]) -> list[float]:
    """Those of one token, in Python's own arithmetic."""
    values = logits.double()
    scores = values.softmax(0) if rule.released.score == "softmax" else values.sigmoid()
    ranked = [max(0.0, score + more) for score, more in zip(scores.tolist(), bias, strict=True)]
    groups, kept = rule.released.num_groups, rule.released.num_kept_groups
    if kept < groups:
        size = EXPERTS // groups
        biased = [score + more for score, more in zip(scores.tolist(), bias, strict=True)]
        worth = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        best = sorted(range(groups), key=worth.__getitem__)[-kept:]
        ranked = [score if expert // size in best else 0.0 for expert, score in enumerate(ranked)]
    return [score / sum(ranked) for score in ranked]


def slow_mask(logits: Tensor, rule: MassRule, p: float, bias: list[float]) -> list[bool]:
    chances = probabilities(logits, rule, bias)
    if isinstance(rule, MinP):
        return [chance >= p * max(chances) for chance in chances]
    mass, mask = 0.0, [False] * EXPERTS
    for expert in sorted(range(EXPERTS), key=lambda expert: -chances[expert]):
        mask[expert] = True
        mass += chances[expert]
        if mass >= p:
            break
    return mask


@pytest.mark.parametrize("released", RELEASED, ids=str)
@pytest.mark.parametrize("kind", [TopP, MinP])
@pytest.mark.parametrize("p", [0.05, 0.37, 0.8])
def test_the_choice_is_that_of_a_loop(kind: type[MassRule], released: ReleasedTopK, p: float) -> None:
    rule, logits = kind(released), some_logits()
    state = state_of(rule, p)
    found = rule.select(logits, state, Phase.CAUSAL).mask
    for row, mask in zip(logits.flatten(0, 1), found.flatten(0, 1), strict=True):
        assert mask.tolist() == slow_mask(row, rule, p, state["selection_bias"].tolist())


@pytest.mark.parametrize("kind", [TopP, MinP])
def test_the_best_expert_is_always_chosen_and_at_first_all_are(kind: type[MassRule]) -> None:
    rule, logits = kind(), some_logits()
    assert rule.select(logits, state_of(rule), Phase.CAUSAL).mask.all()
    mask = rule.select(logits, state_of(rule, 0.0 + 1e-30 if kind is TopP else 1.0), Phase.CAUSAL).mask
    assert torch.equal(mask, torch.nn.functional.one_hot(logits.argmax(-1), EXPERTS).bool())


@pytest.mark.parametrize("released", RELEASED, ids=str)
@pytest.mark.parametrize("kind", [TopP, MinP])
@pytest.mark.parametrize("per_token", [1.0, 1.7, 2.5, 3.9])
def test_the_quantile_of_all_pairs_gives_the_mean_exactly(
    kind: type[MassRule], released: ReleasedTopK, per_token: float
) -> None:
    rule, logits = kind(released), some_logits()
    state = state_of(rule)
    scores = rule.pool_scores(logits, state).reshape(-1, 1)
    rule.set_thresholds(state, streamed_kth_largest(lambda: iter(scores.split(100)), [per_token / EXPERTS]))
    assert int(rule.select(logits, state, Phase.CAUSAL).mask.sum()) == round(200 * per_token)


def test_experts_that_reach_p_exactly_are_enough() -> None:
    rule = TopP()
    mask = rule.select(torch.zeros(1, 1, EXPERTS), state_of(rule, 0.5), Phase.CAUSAL).mask  # an eighth each
    assert mask[0, 0].tolist() == [True] * 4 + [False] * 4
