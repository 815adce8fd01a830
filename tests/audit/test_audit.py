"""The audit passes what is causal and catches what is not, each leak by the check that is meant for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from leaky_rules import (
    BatchMean,
    BatchSize,
    BonusInFirstPass,
    CalibratesItself,
    CountsInItsFile,
    CountsOnItself,
    DrawsLots,
    FirstOfPass,
    LargeBatch,
    LastButOne,
    LastToken,
    LongSequence,
    NeighbourSequence,
    NextToken,
    RareToken,
    SeesPadding,
    WritesToLogits,
)
from torch import Tensor

from lightning_moe.audit import Finding, Verdict, audit, format_report, verdict
from lightning_moe.errors import UserError
from lightning_moe.model import Decoder, DecoderConfig, MoELayer
from lightning_moe.model.layers import LayerCache
from lightning_moe.routing import (
    ExpertChoice,
    ExpertThreshold,
    Phase,
    QuantileBalancing,
    RoutingRule,
    TokenChoice,
    TokenChoiceAuxLoss,
    TokenChoiceLossFree,
)

CAUSAL_RULES = [
    ExpertThreshold(),
    ExpertChoice(),
    TokenChoice(),
    TokenChoiceAuxLoss(),
    TokenChoiceLossFree(),
    QuantileBalancing(),
]
CHECKS = {
    "state", "repetition", "future token", "other sequences", "batch size", "padding", "decoding", "rule alone"
}  # fmt: skip
OF_OTHERS = CHECKS - {"state", "repetition"}  # what a rule fails that looks at all tokens of a pass
OF_FUTURE = OF_OTHERS - {"other sequences", "batch size"}


def decoder(rule: RoutingRule | None, **options: Any) -> Decoder:
    """3 layers, the first dense; every weight random, so that the output depends on all routing."""
    sizes = {"vocab_size": 40, "max_sequence_length": 24, "hidden_size": 16, "num_layers": 3, "num_experts": 4}
    model = Decoder(DecoderConfig(**{**sizes, "num_attention_heads": 2, **options}), rule)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    for layer in model.moe_layers():
        for name in ("threshold", "selection_bias"):
            if name in layer.state:
                layer.state[name].copy_(torch.randn(4) * 0.1)
    return model.double()


def text(sequences: int = 4, length: int = 24) -> Tensor:
    return torch.randint(0, 40, (sequences, length), generator=torch.Generator().manual_seed(5))


def leaking(findings: list[Finding]) -> set[str]:
    return {finding.check for finding in findings if finding.leaks}


@pytest.mark.parametrize("rule", [*CAUSAL_RULES, None], ids=lambda rule: type(rule).__name__)
def test_every_rule_is_causal_at_inference(rule: RoutingRule | None) -> None:
    findings = audit(decoder(rule), text())
    assert {finding.check for finding in findings} == CHECKS - ({"rule alone"} if rule is None else set())
    layers = [] if rule is None else ["layer_01", "layer_02"]
    for check in CHECKS:
        last = {"state": ["rest of model"], "rule alone": []}.get(check, ["output"])
        assert [finding.where for finding in findings if finding.check == check] == layers + last
    assert leaking(findings) == set()
    assert sum(finding.num_unjudged for finding in findings) == 0  # nothing passes by not being looked at
    assert verdict(findings) is Verdict.CAUSAL
    assert "\nverdict: causal." in format_report(findings)


@pytest.mark.parametrize("options", [{"router": "cosine"}, {"gate": "softmax"}, {"num_key_value_heads": 1}])
def test_options_of_the_decoder_are_causal_too(options: dict[str, Any]) -> None:
    assert leaking(audit(decoder(TokenChoice(), **options), text())) == set()


@pytest.mark.parametrize("pool", ["sequence", "micro_batch", "global", 2])
def test_expert_choice_in_training_is_caught(pool: str | int) -> None:
    findings = audit(decoder(ExpertChoice(pool=pool)), text(), Phase.TRAIN)
    others = (
        set() if pool == "sequence" else {"other sequences", "batch size"} - ({"batch size"} if pool == 2 else set())
    )
    assert {"future token", "padding", "rule alone"} | others == leaking(findings)
    assert "verdict: leaks." in format_report(findings)


@pytest.mark.parametrize("rule", CAUSAL_RULES[2:], ids=lambda rule: type(rule).__name__)
def test_token_choice_is_causal_in_training(rule: RoutingRule) -> None:
    assert leaking(audit(decoder(rule), text(), Phase.TRAIN)) == set()


def test_thresholds_leak_in_training_only_through_their_capacity_and_in_the_warmup() -> None:
    assert leaking(audit(decoder(ExpertThreshold(capacity_factor=None)), text(), Phase.TRAIN)) == set()
    assert "future token" in leaking(audit(decoder(ExpertThreshold(capacity_factor=0.0)), text(), Phase.TRAIN))
    assert "future token" in leaking(audit(decoder(ExpertThreshold(capacity_factor=None)), text(), Phase.WARMUP))


@pytest.mark.parametrize(
    ("rule", "caught_by"),
    [
        (BatchMean(), OF_OTHERS),
        (LastToken(), OF_FUTURE),
        (LastButOne(), OF_FUTURE),
        (NextToken(), OF_FUTURE),
        (NeighbourSequence(), OF_OTHERS - {"decoding"}),
        (BatchSize(), {"batch size", "rule alone"}),
        (FirstOfPass(), {"decoding", "rule alone"}),
        (SeesPadding(), {"padding", "decoding", "rule alone"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_leaky_rule_is_caught_by_the_check_for_its_leak(rule: RoutingRule, caught_by: set[str]) -> None:
    findings = audit(decoder(rule), text())
    assert leaking(findings) == caught_by
    first = next(finding for finding in findings if finding.leaks)
    assert first.where == "layer_01"  # where it begins, not where its consequences are
    assert first.num_changed > 0
    assert first.changed_at is not None


@pytest.mark.parametrize("rule", [RareToken(), LongSequence(), LargeBatch()], ids=lambda rule: type(rule).__name__)
def test_what_no_text_of_this_size_shows_is_found_with_the_rule_alone(rule: RoutingRule) -> None:
    """A leak of one token in 20,000, of sequences of 500 tokens or more, of batches of 100 sequences or more."""
    findings = audit(decoder(rule), text())
    assert leaking(findings) == {"rule alone"}
    assert verdict(findings) is Verdict.LEAKS


@pytest.mark.parametrize(
    ("rule", "named", "caught_by"),
    [
        (CalibratesItself(), "layer_02: state.threshold, state.calibrated", CHECKS),
        (BonusInFirstPass(), "layer_02: state.passes", {"repetition", "decoding", "rule alone", "state"}),
        (CountsOnItself(), "layer_02: rule, state.rule", {"state"}),
        (CountsInItsFile(), "layer_02: variables of leaky_rules", {"state"}),
        (DrawsLots(), "rest of model: random numbers", CHECKS),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_rule_that_writes_in_the_forward_pass_is_caught_and_the_report_says_what_it_writes(
    rule: RoutingRule, named: str, caught_by: set[str]
) -> None:
    findings = audit(decoder(rule), text())
    assert verdict(findings) is Verdict.LEAKS
    assert leaking(findings) == caught_by
    assert f"passes change, in {named}\n" in format_report(findings)


def test_a_rule_that_writes_to_the_logits_leaks_through_the_gates() -> None:
    """Its choices are causal; the logits of which the gates are made are not."""
    findings = audit(decoder(WritesToLogits()), text())
    assert leaking(findings) == OF_FUTURE
    first = next(finding for finding in findings if finding.leaks)
    assert (first.where, first.num_changed) == ("layer_01", 0)
    assert first.largest > first.tolerance


def test_a_leak_through_the_gates_is_found_in_the_layer_whatever_the_experts_give() -> None:
    """The choices are causal, but the weights follow the last token; the experts' output is zero."""
    model = decoder(ExpertThreshold())
    layer = list(model.moe_layers())[1]
    gates = layer.gates
    layer.gates = lambda logits, mask: gates(logits, mask) * (1 + 0.1 * logits[:, -1:].sigmoid())
    for parameter in layer.experts.parameters():
        torch.nn.init.zeros_(parameter)
    findings = audit(model, text())
    assert leaking(findings) == {"rule alone"}
    [leak] = [finding for finding in findings if finding.leaks]
    assert leak.where == "layer_02"
    assert leak.num_changed == 0
    assert "largest change of a gate: " in format_report(findings)


def test_a_parameter_that_a_pass_changes_is_named() -> None:
    model = decoder(None)

    class Drifts(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            self.inner.weight.mul_(1 + 1e-12)
            return self.inner(x)

    model.head = Drifts(model.head)
    assert "in rest of model: head.inner.weight" in format_report(audit(model, text()))


def test_the_report_says_what_was_not_covered() -> None:
    report = format_report(audit(decoder(ExpertThreshold()), text(3, 10), Phase.TRAIN))
    covered, alone, missing = report.splitlines()[-3:]
    assert covered.startswith("covered: phase train; 30 tokens of text (3 sequences of 10); batches of 1, 2, 3 and 6; ")
    assert "; sequences of 1, 2, 5, 7, 9 and 10 tokens; the future replaced after 27 of 27 positions" in covered
    assert alone.startswith("  the rule alone: 65536 tokens per layer; batches of 1, 32, 64, 1024, ")
    assert missing.startswith("not covered: phases warmup and causal; in the whole model longer sequences, ")


def test_a_leak_of_one_token_is_found_at_its_place() -> None:
    """In the second MoE layer only, position 3 of each sequence looks at the last token."""
    model = decoder(ExpertThreshold())
    layer = list(model.moe_layers())[1]

    class Peeks(ExpertThreshold):
        def select(self, logits: Tensor, state: Any, phase: Phase) -> Any:
            selection = super().select(logits, state, phase)
            if logits.shape[1] > 3:
                selection.mask[:, 3] = logits[:, -1] > 0
            return selection

    layer.rule = Peeks()
    findings = [finding for finding in audit(model, text()) if finding.check == "future token"]
    by_place = {finding.where: finding for finding in findings}
    assert not by_place["layer_01"].leaks
    assert by_place["layer_02"].changed_at.position == 3
    assert by_place["layer_02"].largest <= by_place["layer_02"].tolerance  # its input is untouched
    assert by_place["output"].largest_at.position == 3
    assert by_place["output"].leaks


def test_a_leak_beside_the_routing_is_found_in_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(None)
    head = model.head.forward
    monkeypatch.setattr(model.head, "forward", lambda x: head(x) + 1e-3 * x.mean())
    assert leaking(audit(model, text())) == {"future token", "other sequences", "batch size", "padding", "decoding"}


def _forgets(cache: LayerCache, keys: Tensor, values: Tensor) -> None:
    if cache.length == 5:
        cache.keys[:, :, 0] = 0


def _misplaces(cache: LayerCache, keys: Tensor, values: Tensor) -> None:
    keys.copy_(keys.flip(-1)) if cache.length else None


@pytest.mark.parametrize("breaks", [_forgets, _misplaces])
def test_a_broken_cache_is_caught_by_decoding_alone(
    breaks: Callable[[LayerCache, Tensor, Tensor], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    append = LayerCache.append

    def broken(cache: LayerCache, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        breaks(cache, keys, values)
        return append(cache, keys, values)

    monkeypatch.setattr(LayerCache, "append", broken)
    assert leaking(audit(decoder(ExpertThreshold()), text())) == {"decoding"}


@pytest.mark.parametrize("rule", [ExpertThreshold(), TokenChoice()], ids=lambda rule: type(rule).__name__)
def test_rounding_at_the_boundary_is_a_tie_and_not_a_leak(rule: RoutingRule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that differ by 1e-6 from pass to pass flip only choices that are as close; 1e-3 is no rounding."""
    model = decoder(rule)
    layer = next(model.moe_layers())
    if isinstance(rule, ExpertThreshold):
        layer.state["threshold"].fill_(0.25)
    noise = {"scale": 1e-6, "sign": 1.0}

    class Rounded(torch.nn.Module):
        """All logits at most the noise apart from the boundary, in a direction that changes with each pass."""

        def forward(self, x: Tensor) -> Tensor:
            noise["sign"] *= -1
            pattern = torch.tensor([1.0, -1.0, 1.0, -1.0]) * noise["sign"] * noise["scale"]
            return (torch.full((*x.shape[:2], 4), 0.25) + pattern).float()

    monkeypatch.setattr(layer, "router", Rounded())
    findings = audit(model, text())
    ties, above = (
        next(finding for finding in findings if (finding.check, finding.where) == ("future token", layer))
        for layer in ("layer_01", "layer_02")
    )
    assert ties.num_ties > 0
    assert above.num_unjudged > 0
    assert leaking(findings) == set()
    assert verdict(findings) is Verdict.NOT_JUDGED  # nearly everything ties, so nothing is said about it
    report = format_report(findings)
    assert "\nverdict: not judged." in report
    assert f"  future token, layer_01: {ties.num_ties} of {ties.num_choices} choices are ties, " in report
    noise["scale"] = 1e-3
    assert "future token" in leaking(audit(model, text()))


def test_the_decoder_is_left_as_it_was() -> None:
    model = decoder(ExpertThreshold()).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    audit(model, text(length=6), Phase.CAUSAL)
    assert model.training
    audit(model.eval(), text(length=6), Phase.WARMUP)
    assert not model.training
    assert all(isinstance(layer, MoELayer) and layer.train_phase is Phase.TRAIN for layer in model.moe_layers())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("sequences", "length"), [(1, 24), (4, 3)])
def test_too_little_text_is_refused(sequences: int, length: int) -> None:
    with pytest.raises(UserError, match=rf"text of {sequences} × {length} tokens"):
        audit(decoder(ExpertThreshold()), text(sequences, length))


def test_logits_that_are_not_finite_are_refused() -> None:
    model = decoder(ExpertThreshold())
    next(model.moe_layers()).router.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"layer_01: .*not finite"):
        audit(model, text())
