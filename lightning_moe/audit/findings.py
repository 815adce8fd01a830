"""What the audit found: one entry for each check and place, and the verdict on all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from lightning_moe.routing import Phase

#: The verdict is `Verdict.NOT_JUDGED` if in one place more than this share of the choices are ties, or more than this
#: share of the tokens are not judged: what looks like rounding may then be a leak. Rounding alone ties less than one
#: choice in a million.
MOST_TIES = 0.001
MOST_UNJUDGED = 0.05
OUTPUT = "output"
REST_OF_MODEL = "rest of model"
FUTURE, RULE_ALONE, STATE = "future token", "rule alone", "state"  # checks that the report describes in words


class Verdict(Enum):
    """The verdict of an audit, with the exit code of the command."""

    CAUSAL = 0
    LEAKS = 1
    NOT_JUDGED = 5


@dataclass(frozen=True)
class Place:
    """Where something was seen.

    Args:
        sequence: number of the sequence in the batch, from 0.
        position: position in the sequence, from 0.
        variant: variant of the check.
    """

    sequence: int
    position: int
    variant: str

    def __str__(self) -> str:
        return f"sequence {self.sequence}, position {self.position} ({self.variant})"


@dataclass(frozen=True)
class Finding:
    """One check in one place: a MoE layer, the output, or (for the check ``state``) the rest of the model.

    Args:
        check: name of the check, such as ``future token``.
        where: name of the layer, ``output``, or ``rest of model``.
        phase: phase whose routing was audited.
        shapes: numbers of sequences and of tokens per sequence of the passes.
        num_variants: number of variants of the check; for ``state`` the number of passes.
        num_sequences: number of compared sequences, over all variants.
        num_tokens: number of compared tokens, over all variants, with those that are not judged.
        num_choices: number of choices of an expert for a token that were compared (0 for the output).
        num_changed: number of choices that differ, without ties; for ``state`` the number of passes that changed it.
        num_ties: number of choices that differ within the tolerance.
        num_unjudged: number of tokens that are not judged, because they follow a tie.
        largest: largest change (absolute) of a logit, or of a gate for the check ``rule alone``.
        tolerance: τ of that comparison, absolute.
        largest_at: place of the largest change; `None` for ``state``.
        changed_at: place of the first changed choice; `None` if there is none.
        changed_state: names of the state that a pass changed; only for ``state``.
    """

    check: str
    where: str
    phase: Phase
    shapes: frozenset[tuple[int, int]] = frozenset()
    num_variants: int = 1
    num_sequences: int = 0
    num_tokens: int = 0
    num_choices: int = 0
    num_changed: int = 0
    num_ties: int = 0
    num_unjudged: int = 0
    largest: float = 0.0
    tolerance: float = 0.0
    largest_at: Place | None = None
    changed_at: Place | None = None
    changed_state: tuple[str, ...] = ()

    @property
    def leaks(self) -> bool:
        """Whether rounding does not explain what changed."""
        return self.num_changed > 0 or self.largest > self.tolerance

    @property
    def is_judged(self) -> bool:
        """Whether so few choices are ties, and so few tokens not judged, that what is left speaks for the place."""
        return self.num_ties <= MOST_TIES * self.num_choices and self.num_unjudged <= MOST_UNJUDGED * self.num_tokens

    def merged(self, other: Finding) -> Finding:
        """Return the sum of this finding and that of another variant of the same check."""
        worst = max(self, other, key=lambda finding: finding.largest - finding.tolerance)
        return replace(
            self,
            shapes=self.shapes | other.shapes,
            num_variants=self.num_variants + other.num_variants,
            num_sequences=self.num_sequences + other.num_sequences,
            num_tokens=self.num_tokens + other.num_tokens,
            num_choices=self.num_choices + other.num_choices,
            num_changed=self.num_changed + other.num_changed,
            num_ties=self.num_ties + other.num_ties,
            num_unjudged=self.num_unjudged + other.num_unjudged,
            largest=worst.largest,
            tolerance=worst.tolerance,
            largest_at=worst.largest_at,
            changed_at=self.changed_at or other.changed_at,
            changed_state=tuple(dict.fromkeys(self.changed_state + other.changed_state)),
        )


def merge(findings: Iterable[Finding]) -> list[Finding]:
    """Return one finding for each check and place, in the order of their first appearance."""
    merged: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        key = finding.check, finding.where
        merged[key] = merged[key].merged(finding) if key in merged else finding
    return list(merged.values())


def verdict(findings: Sequence[Finding]) -> Verdict:
    """Return the verdict: a leak anywhere, else a place that is not judged, else causal."""
    if any(finding.leaks for finding in findings):
        return Verdict.LEAKS
    return Verdict.CAUSAL if all(finding.is_judged for finding in findings) else Verdict.NOT_JUDGED
