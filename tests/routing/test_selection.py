"""What each rule selects: exact counts, thresholds, capacity, ties, and causality as a law."""

import math

import pytest
import torch
from helpers.routing_reference import RULES, RULES_AND_PHASES, make_state, name_of, reference_mask
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.routing import (
    ExpertChoice,
    ExpertThreshold,
    Phase,
    RoutingRule,
    RoutingState,
    TokenChoice,
    TokenChoiceAuxLoss,
    TokenChoiceLossFree,
    rule_from_config,
    target_count,
)


@st.composite
def router_logits(draw: st.DrawFn, num_experts: int = 4, min_batch: int = 1) -> Tensor:
    """fp32 [B, S, E] of multiples of a coarse grid (many ties) or of a fine one (none)."""
    batch, length = draw(st.integers(min_batch, 3)), draw(st.integers(2, 12))
    grid = draw(st.sampled_from([2.0, 0.5, 2.0**-12]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return (torch.randn(batch, length, num_experts, generator=generator) / grid).round() * grid


@pytest.mark.parametrize(("rule", "phase"), RULES_AND_PHASES, ids=name_of)
@pytest.mark.parametrize("num_experts_per_token", [1, 3])
@given(logits=router_logits())
def test_selection_is_that_of_the_slow_rule(
    rule: RoutingRule, phase: Phase, num_experts_per_token: int, logits: Tensor
) -> None:
    state = make_state(rule, 4, num_experts_per_token)
    mask = rule.select(logits, state, phase).mask
    assert mask.dtype == torch.bool
    assert torch.equal(mask, reference_mask(rule, logits, state, phase))


@given(
    logits=router_logits(),
    per_token=st.sampled_from([0.3, 1, 1.7, 4]),
    pool=st.sampled_from(["micro_batch", "sequence"]),
)
def test_expert_choice_takes_exactly_k_tokens_per_expert_and_pool(logits: Tensor, per_token: float, pool: str) -> None:
    """Also where scores tie, and where k does not divide evenly (rounded half up, at least 1)."""
    mask = ExpertChoice(pool=pool).select(logits, RoutingState(ExpertChoice(), 4, per_token), Phase.TRAIN).mask
    pools = mask if pool == "sequence" else mask.reshape(1, -1, 4)
    k = target_count(pools.shape[1], per_token / 4)
    assert (pools.sum(1) == k).all()


@pytest.mark.parametrize("phase", [Phase.TRAIN, Phase.CAUSAL])
def test_threshold_selects_what_lies_strictly_above_it(phase: Phase) -> None:
    rule = ExpertThreshold(capacity_factor=None)
    state = RoutingState(rule, 2, 1)
    state["threshold"].copy_(torch.tensor([0.5, -1.0]))
    above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    logits = torch.tensor([[[0.5, -1.0], [above, 0.0], [torch.inf, -torch.inf], [0.49, -2.0]]])
    expected = [[[False, False], [True, True], [True, False], [False, False]]]
    selection = rule.select(logits, state, phase)
    assert selection.mask.tolist() == expected
    assert selection.num_dropped is None
    assert selection.num_added is None


@given(logits=router_logits(), capacity_factor=st.sampled_from([0.0, 0.1, 0.5, 0.7, 1.0, 2.0]), shift=st.floats(-3, 3))
def test_capacity_bounds_drops_the_lowest_and_adds_the_next_highest(
    logits: Tensor, capacity_factor: float, shift: float
) -> None:
    rule = ExpertThreshold(capacity_factor=capacity_factor)
    state = RoutingState(rule, 4, 1)
    state["threshold"].copy_(torch.tensor([-1.0, 0.0, 1.0, 5.0]) + shift)
    above = logits > state["threshold"]
    selection = rule.select(logits, state, Phase.TRAIN)
    num_tokens = logits.shape[0] * logits.shape[1]
    k = num_tokens / 4
    hundredths = round(100 * capacity_factor)  # exact integers: no rounding of 1 - C
    upper = min(num_tokens, num_tokens * (100 + hundredths) // 400)
    lower = min(upper, max(0, -(-num_tokens * (100 - hundredths) // 400)))
    count, mask = selection.mask.sum((0, 1)), selection.mask
    assert (count >= lower).all()
    assert (count <= upper).all()
    assert selection.lower_bound == lower
    assert k - lower <= capacity_factor * k + 1

    dropped, added = above & ~mask, mask & ~above
    assert torch.equal(selection.num_dropped, dropped.sum((0, 1)))
    assert torch.equal(selection.num_added, added.sum((0, 1)))
    for i in range(4):
        r, kept = logits[..., i], mask[..., i]
        if dropped[..., i].any():
            assert not added[..., i].any()
            assert count[i] == upper
            assert upper == 0 or r[dropped[..., i]].max() <= r[kept].min()
        if added[..., i].any():
            assert count[i] == lower
            assert r[added[..., i]].min() >= r[~kept].max() if (~kept).any() else True


@pytest.mark.parametrize(
    ("num_tokens", "capacity_factor", "lower", "upper"),
    [(40, 0.7, 3, 17), (100, 0.16, 21, 29), (40, 0.1, 9, 11), (12, 0.5, 2, 4), (6, 0.5, 1, 2), (4, 2.0, 0, 3)],
)
def test_capacity_bounds_are_those_of_exact_arithmetic(
    num_tokens: int, capacity_factor: float, lower: int, upper: int
) -> None:
    """k = N/4; in floating point (1 − 0.7)·10 lies above 3 and 1.16·25 below 29."""
    rule = ExpertThreshold(capacity_factor=capacity_factor)
    state, logits = RoutingState(rule, 4, 1), torch.randn(1, num_tokens, 4)
    counts = []
    for threshold in (torch.inf, -torch.inf):
        state["threshold"].fill_(threshold)
        selection = rule.select(logits, state, Phase.TRAIN)
        assert selection.lower_bound == lower
        counts.append(selection.mask.sum((0, 1)).tolist())
    assert counts == [[lower] * 4, [upper] * 4]


def test_capacity_is_for_training_only() -> None:
    rule, logits = ExpertThreshold(capacity_factor=0.5), torch.randn(2, 8, 4)
    state = RoutingState(rule, 4, 1)
    state["threshold"].fill_(-torch.inf)
    assert rule.select(logits, state, Phase.CAUSAL).mask.all()
    assert rule.select(logits, state, Phase.TRAIN).mask.sum((0, 1)).tolist() == [6] * 4  # (1 + 0.5) * 16 / 4


@given(logits=router_logits(num_experts=6), k=st.integers(1, 6))
def test_token_choice_gives_every_token_exactly_k_experts(logits: Tensor, k: int) -> None:
    """Conservation: the loads sum to tokens times k."""
    for rule in (TokenChoice(), TokenChoiceAuxLoss(), TokenChoiceLossFree()):
        mask = rule.select(logits, make_state(rule, 6, k), Phase.TRAIN).mask
        assert (mask.sum(-1) == k).all()


def test_token_choice_gives_equal_scores_to_the_lower_index() -> None:
    mask = (
        TokenChoice()
        .select(torch.tensor([[[1.0, 3.0, 3.0, 1.0]]]), RoutingState(TokenChoice(), 4, 3), Phase.TRAIN)
        .mask
    )
    assert mask[0, 0].tolist() == [True, True, True, False]


def depends_on_others(rule: RoutingRule, phase: Phase, logits: Tensor, others: Tensor, order: Tensor) -> bool:
    """Whether the mask of token (0, s) changes when all other tokens, their order or the batch do."""
    state = make_state(rule, logits.shape[-1], 1)
    alone = rule.select(logits, state, phase).mask
    changed = False
    for s in range(logits.shape[1]):
        altered = others.clone()
        altered[0, s] = logits[0, s]
        changed |= not torch.equal(rule.select(altered, state, phase).mask[0, s], alone[0, s])
        changed |= not torch.equal(rule.select(logits[:1, s : s + 1], state, phase).mask[0, 0], alone[0, s])
    permuted = rule.select(logits[:, order], state, phase).mask
    return changed or not torch.equal(permuted, alone[:, order])


CAUSAL_SELECTIONS = [
    *((rule, Phase.CAUSAL) for rule in RULES),
    (TokenChoice(), Phase.TRAIN),
    (TokenChoiceAuxLoss(), Phase.TRAIN),
    (TokenChoiceLossFree(), Phase.TRAIN),
    (ExpertThreshold(capacity_factor=None), Phase.TRAIN),
]


@pytest.mark.parametrize(("rule", "phase"), CAUSAL_SELECTIONS, ids=name_of)
@given(logits=router_logits(min_batch=2), data=st.data())
def test_a_tokens_experts_depend_on_that_token_alone(
    rule: RoutingRule, phase: Phase, logits: Tensor, data: st.DataObject
) -> None:
    order = torch.tensor(data.draw(st.permutations(range(logits.shape[1]))))
    others = torch.randn(logits.shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))) * 2
    assert not depends_on_others(rule, phase, logits, others, order)


@pytest.mark.parametrize(
    ("rule", "phase"),
    [
        (ExpertChoice(), Phase.TRAIN),
        (ExpertChoice(pool="sequence"), Phase.TRAIN),
        (ExpertThreshold(), Phase.WARMUP),
        (ExpertThreshold(), Phase.TRAIN),  # by its capacity
    ],
    ids=name_of,
)
def test_the_causality_check_catches_rules_that_pool_tokens(rule: RoutingRule, phase: Phase) -> None:
    logits, others = torch.randn(2, 12, 4), torch.randn(2, 12, 4) * 2
    assert depends_on_others(rule, phase, logits, others, torch.randperm(12))


@pytest.mark.parametrize("rule", [*RULES, ExpertThreshold(capacity_factor=None)], ids=name_of)
def test_rule_comes_back_from_its_config(rule: RoutingRule) -> None:
    config = rule.to_config()
    assert rule_from_config(config) == rule
    assert type(rule_from_config(config)) is type(rule)
    assert rule_from_config({"class_path": f"lightning_moe.routing.{type(rule).__name__}"}) == type(rule)()


def test_no_rule_is_the_dense_model() -> None:
    assert rule_from_config(None) is None


@pytest.mark.parametrize(
    ("class_path", "message"),
    [
        ("lightning_moe.routing.Nothing", r"'lightning_moe\.routing\.Nothing' cannot be imported"),
        ("no_such_module.Rule", r"'no_such_module\.Rule' cannot be imported.*PYTHONPATH"),
        ("Rule", "'Rule' cannot be imported"),
        ("math.sqrt", r"'math\.sqrt' is not a RoutingRule"),
    ],
)
def test_a_rule_that_is_none_is_refused_by_name(class_path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rule_from_config({"class_path": class_path, "init_args": {}})


def test_options_a_rule_does_not_have_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"ExpertThreshold does not take these options: .*'ema_deccay'"):
        rule_from_config({"class_path": "lightning_moe.routing.ExpertThreshold", "init_args": {"ema_deccay": 0.5}})


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: ExpertThreshold(ema_decay=1.0), r"model\.routing\.ema_decay=1\.0"),
        (lambda: ExpertThreshold(ema_decay=math.nan), r"model\.routing\.ema_decay=nan"),
        (lambda: ExpertChoice(ema_decay=-0.1), r"model\.routing\.ema_decay=-0\.1"),
        (lambda: ExpertThreshold(capacity_factor=-1.0), r"model\.routing\.capacity_factor=-1\.0"),
        (lambda: ExpertChoice(pool="batch"), r"model\.routing\.pool='batch'"),  # type: ignore[arg-type]
        (lambda: TokenChoice().check(8, 1.5), r"model\.decoder\.num_experts_per_token=1\.5: TokenChoice"),
    ],
)
def test_bad_options_are_refused_by_name(make: object, key: str) -> None:
    with pytest.raises(UserError, match=key):
        make()  # type: ignore[operator]
