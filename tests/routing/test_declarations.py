"""What a rule declares for export, calibration and analysis; and that nobody asks for its class instead."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.routing_reference import RULES, make_state, name_of, reference_mask
from torch import Tensor

import lightning_moe
from lightning_moe import routing
from lightning_moe.routing import (
    CausalChoice,
    ExpertChoice,
    ExpertThreshold,
    Phase,
    QuantileBalancing,
    RoutingRule,
    RoutingState,
    Selection,
    TokenChoice,
    TokenChoiceLossFree,
)

PACKAGE = Path(lightning_moe.__file__).parent
RULE_CLASSES = {
    name for name, value in vars(routing).items() if isinstance(value, type) and issubclass(value, RoutingRule)
} | {"ThresholdTracking"}


@pytest.mark.parametrize("rule", RULES, ids=name_of)
@pytest.mark.parametrize("per_token", [1, 2])
def test_the_declared_choice_is_the_reference(rule: RoutingRule, per_token: int) -> None:
    state = make_state(rule, 4, per_token)
    logits = torch.randn(3, 8, 4).mul(4).round().div(4)  # with ties
    assert rule.causal_choice is not None
    assert torch.equal(rule.causal_choice.mask(logits, state), reference_mask(rule, logits, state, Phase.CAUSAL))


@dataclass(frozen=True)
class OtherOption(ExpertThreshold):
    ema_decay: float = 0.5


class OtherSelect(TokenChoiceLossFree):
    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        return super().select(logits.abs(), state, phase)


class Noise:
    """No rule itself."""

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        raise NotImplementedError


class Mixed(Noise, ExpertThreshold):
    pass


class Again(OtherSelect):
    causal_choice = CausalChoice.TOP_K_OF_SIGMOID


class Below(Again):
    pass


@pytest.mark.parametrize(
    ("rule", "choice"),
    [
        (OtherOption, CausalChoice.THRESHOLD),
        (OtherSelect, None),
        (Mixed, None),
        (Again, CausalChoice.TOP_K_OF_SIGMOID),
        (Below, CausalChoice.TOP_K_OF_SIGMOID),
        (RoutingRule, None),
    ],
)
def test_a_declaration_ends_where_select_is_overridden(rule: type[RoutingRule], choice: CausalChoice | None) -> None:
    assert rule.causal_choice is choice


def test_a_threshold_rule_without_thresholds_is_refused() -> None:
    class Forgetful(OtherOption):
        def initial_state(self, num_experts: int, num_experts_per_token: float) -> Mapping[str, Tensor]:
            return {"threshold": torch.zeros(())}

    with pytest.raises(TypeError, match=r"Forgetful: causal_choice THRESHOLD needs a state 'threshold'"):
        RoutingState(Forgetful(), 4, 1)


@pytest.mark.parametrize(
    ("rule", "warmup", "train", "over_ranks"),
    [
        (ExpertChoice(pool="global"), "global", "global", True),
        (ExpertChoice(pool=3), 3, 3, False),
        (ExpertThreshold(warmup_pool="global"), "global", None, True),
        (ExpertThreshold(warmup_pool="sequence"), "sequence", None, False),
        (TokenChoice(), None, None, False),
    ],
    ids=str,
)
def test_pools(rule: RoutingRule, warmup: object, train: object, over_ranks: bool) -> None:
    assert [rule.pool_in(phase) for phase in (Phase.WARMUP, Phase.TRAIN, Phase.CAUSAL)] == [warmup, train, None]
    assert rule.pools_over_ranks is over_ranks


def test_the_memory_of_an_average() -> None:
    """Half of the weight of all batches lies in the last half life."""
    assert ExpertThreshold(ema_decay=0.75).memory(100) == 400
    assert QuantileBalancing().memory(100) == 100
    assert ExpertThreshold(ema_half_life_tokens=50).memory(50) == pytest.approx(100)
    assert TokenChoice().memory(100) is None


def asked_for(source: str) -> Iterator[str]:
    """Where a file looks at the class of a rule: any use of its name, except to call it or to import it.

    `RoutingRule` itself may stand in annotations and be derived from.
    """
    tree = ast.parse(source)
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        if name in RULE_CLASSES - {"RoutingRule"} and id(node) not in called:
            yield f"line {node.lineno}: {name}"
        if name in ("isinstance", "issubclass") and "RoutingRule" in ast.unparse(called.get(id(node), node)):
            yield f"line {node.lineno}: {name}"


def test_nobody_outside_of_routing_asks_for_the_class_of_a_rule() -> None:
    files = [*PACKAGE.rglob("*.py"), *(Path(__file__).parents[2] / "benchmarks").glob("*.py")]
    found = [
        f"{path} {place}"
        for path in files
        if path.parent != PACKAGE / "routing"
        for place in asked_for(path.read_text(encoding="utf-8"))
    ]
    assert len(files) > 150
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(rule, ExpertThreshold)",
        "isinstance(rule, TokenChoice | routing.ExpertChoice)",
        "issubclass(kind, RoutingRule)",
        "type(rule) is TokenChoice",
        "KNOWN = {QuantileBalancing: 1}",
        "match rule:\n    case ExpertChoice(): pass",
    ],
)
def test_such_a_question_is_found(source: str) -> None:
    assert list(asked_for(source))


def test_building_a_rule_and_naming_the_base_class_is_no_question() -> None:
    source = "from lightning_moe.routing import TokenChoice\ndef f(rule: RoutingRule = TokenChoice()) -> None: pass"
    assert not list(asked_for(source))
