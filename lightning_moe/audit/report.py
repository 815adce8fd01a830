"""The audit's table and verdict as text."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_moe.audit.compare import OUTPUT, RELATIVE_TOLERANCE, Finding
from lightning_moe.report.tables import text_table

HEADER = ("changed", "seen in", "choices compared", "changed", "ties", "unjudged", "largest Δlogit", "tolerance", "")


def format_report(findings: Sequence[Finding]) -> str:
    """Return the table, one row for each check and place, and below it the verdict."""
    numbers = range(2, len(HEADER) - 1)
    table = text_table([HEADER, *(_row(finding) for finding in findings)], right=numbers)
    return "\n".join([table, "", _explanation(), "", verdict(findings)])


def verdict(findings: Sequence[Finding]) -> str:
    """Return ``causal`` or ``leaks``, with the largest change and where it was seen."""
    leaks = [finding for finding in findings if finding.leaks]
    if not leaks:
        worst = max(findings, key=lambda finding: finding.largest / (finding.tolerance or 1.0))
        return f"verdict: causal. Largest change of a logit: {_size(worst) if worst.largest else 'none'}"
    lines = ["verdict: leaks."]
    for check in dict.fromkeys(finding.check for finding in leaks):
        here = [finding for finding in leaks if finding.check == check]
        first = here[0]  # the lowest layer: what differs above may be its consequence
        lines.append(f"  {check}: first in {first.where}")
        if first.changed_at is not None:
            lines.append(
                f"    {first.num_changed} of {first.num_choices} choices of experts change, "
                f"the first at {first.changed_at}"
            )
        worst = max(here, key=lambda finding: finding.largest)
        lines.append(f"    largest change of a logit: {_size(worst)}")
    return "\n".join(lines)


def _size(finding: Finding) -> str:
    return (
        f"{finding.largest:.2g} (tolerance {finding.tolerance:.2g}), {finding.check}, {finding.where}, "
        f"{finding.largest_at}"
    )


def _explanation() -> str:
    return (
        f"tolerance: {RELATIVE_TOLERANCE:g} × rms of the logits there (float64 model; fp32 router and logits).\n"
        "ties: choices that differ because a logit is within the tolerance of where the rule decides.\n"
        "unjudged: tokens in layers above a tie, at its position and later ones, which rightly differ."
    )


def _row(finding: Finding) -> tuple[str, ...]:
    counts = (finding.num_choices, finding.num_changed, finding.num_ties)
    return (
        finding.check,
        finding.where,
        *(("", "", "") if finding.where == OUTPUT else map(str, counts)),
        str(finding.num_unjudged),
        f"{finding.largest:.2g}",
        f"{finding.tolerance:.2g}",
        "LEAK" if finding.leaks else "ok",
    )
