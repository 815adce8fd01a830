"""The audit's table and verdict as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning_moe.audit.compare import RELATIVE_TOLERANCE
from lightning_moe.audit.findings import (
    FUTURE,
    MOST_TIES,
    MOST_UNJUDGED,
    OUTPUT,
    RULE_ALONE,
    STATE,
    Finding,
    Verdict,
    verdict,
)
from lightning_moe.report.tables import text_table
from lightning_moe.routing import Phase

HEADER = ("changed", "seen in", "choices compared", "changed", "ties", "unjudged", "largest Δlogit", "tolerance", "")


def format_report(findings: Sequence[Finding]) -> str:
    """Return the table, one row for each check and place, and below it the verdict in words."""
    numbers = range(2, len(HEADER) - 1)
    table = text_table([HEADER, *(_row(finding) for finding in findings)], right=numbers)
    lines = {Verdict.CAUSAL: _causal, Verdict.LEAKS: _leaks, Verdict.NOT_JUDGED: _not_judged}[verdict(findings)](
        findings
    )
    return "\n".join([table, "", _explanation(), "", *lines, *_coverage(findings)])


def _causal(findings: Sequence[Finding]) -> list[str]:
    compared = [finding for finding in findings if finding.check not in (STATE, RULE_ALONE)]
    worst = max(compared, key=lambda finding: finding.largest / (finding.tolerance or 1.0))
    return [f"verdict: causal. Largest change of a logit: {_size(worst) if worst.largest else 'none'}"]


def _leaks(findings: Sequence[Finding]) -> list[str]:
    lines = ["verdict: leaks."]
    leaks = [finding for finding in findings if finding.leaks]
    for check in dict.fromkeys(finding.check for finding in leaks):
        here = [finding for finding in leaks if finding.check == check]
        first = here[0]  # the lowest layer: what differs above may be its consequence
        if check == STATE:
            lines += [
                f"  state: {finding.num_changed} of {finding.num_variants} passes change, in {finding.where}: "
                f"{', '.join(finding.changed_state)}"
                for finding in here
            ]
            continue
        lines.append(f"  {check}: first in {first.where}")
        if first.changed_at is not None:
            lines.append(
                f"    {first.num_changed} of {first.num_choices} choices of experts change, "
                f"the first at {first.changed_at}"
            )
        worst = max(here, key=lambda finding: finding.largest)
        lines.append(f"    largest change of a {'gate' if check == RULE_ALONE else 'logit'}: {_size(worst)}")
    return lines


def _not_judged(findings: Sequence[Finding]) -> list[str]:
    lines = [
        "verdict: not judged. Nothing leaks for certain, but what looks like rounding may be a leak: more than "
        f"{MOST_TIES:.1%} of the choices are ties, or more than {MOST_UNJUDGED:.0%} of the tokens are not judged."
    ]
    for finding in findings:
        if not finding.is_judged:
            lines.append(
                f"  {finding.check}, {finding.where}: {finding.num_ties} of {finding.num_choices} choices are ties, "
                f"{finding.num_unjudged} of {finding.num_tokens} tokens are not judged"
            )
    return [*lines, "  Other text, or more sequences, may avoid single ties; many ties are a property of the rule."]


def _coverage(findings: Sequence[Finding]) -> list[str]:
    """Say what the verdict covers, and what it does not."""
    compared = [finding for finding in findings if finding.check not in (STATE, RULE_ALONE)]
    shapes = sorted(frozenset().union(*(finding.shapes for finding in compared)))
    future = [finding for finding in compared if finding.check == FUTURE]
    [(sequences, length)] = future[0].shapes
    tokens = sequences * length
    phase = compared[0].phase
    alone = [finding for finding in findings if finding.check == RULE_ALONE]
    positions = sequences * (length - 1)
    lines = [
        f"covered: phase {phase.value}; {tokens} tokens of text ({sequences} sequences of {length}); batches of "
        f"{_listed(batch for batch, _ in shapes)}; sequences of {_listed(length for _, length in shapes)} tokens; the "
        f"future replaced after {min(future[0].num_sequences, positions)} of {positions} positions",
    ]
    if alone:
        shapes = sorted(frozenset().union(*(finding.shapes for finding in alone)))
        lines.append(
            f"  the rule alone: {max(batch * length for batch, length in shapes)} tokens per layer; batches of "
            f"{_listed(batch for batch, _ in shapes)}; sequences of {_listed(length for _, length in shapes)} tokens"
        )
    others = " and ".join(other.value for other in Phase if other is not phase)
    return [
        *lines,
        f"not covered: phases {others}; in the whole model longer sequences, larger batches, other text, and a future "
        "that matters at the remaining positions only; other precisions and devices than those of this audit",
    ]


def _listed(numbers: Iterable[int]) -> str:
    *most, last = map(str, sorted(set(numbers)))
    return f"{', '.join(most)} and {last}" if most else last


def _size(finding: Finding) -> str:
    return (
        f"{finding.largest:.2g} (tolerance {finding.tolerance:.2g}), {finding.check}, {finding.where}, "
        f"{finding.largest_at}"
    )


def _explanation() -> str:
    return (
        f"tolerance: {RELATIVE_TOLERANCE:g} × rms of the logits there (float64 model; fp32 router and logits).\n"
        "ties: choices that differ because a logit is within the tolerance of where the rule decides.\n"
        "unjudged: tokens in layers above a tie, at its position and later ones, which rightly differ.\n"
        "state: what a pass changed in the model. rule alone: the rule without the model; its Δ is that of a gate."
    )


def _row(finding: Finding) -> tuple[str, ...]:
    if finding.check == STATE:
        verdict_here = "LEAK" if finding.leaks else "ok"
        return (finding.check, finding.where, "", str(finding.num_changed), "", "", "", "", verdict_here)
    counts = (finding.num_choices, finding.num_changed, finding.num_ties)
    return (
        finding.check,
        finding.where,
        *(("", "", "") if finding.where == OUTPUT else map(str, counts)),
        str(finding.num_unjudged),
        f"{finding.largest:.2g}",
        f"{finding.tolerance:.2g}",
        "LEAK" if finding.leaks else "ok" if finding.is_judged else "not judged",
    )
