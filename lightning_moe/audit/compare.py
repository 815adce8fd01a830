"""Comparison of two passes in which the compared tokens and their past are the same.

Only rounding may differ, because a matmul of another shape adds in another order. So logits must agree within a
tolerance τ. Choices of experts must agree, except for *ties*: a choice that changes because a logit is within τ of the
value where the rule decides. The rule itself says whether a changed choice is a tie: it is asked again with the
reference's logits, where only the changed ones are moved by τ in the direction of the change, and for a tie it must
make the new choice. For thresholds that means |logit − threshold| < τ, for token choice a gap of less than 2 τ between
the k-th and the next.

Tokens after a tie (in higher layers, at that position and later ones of the sequence) rightly differ. They are not
judged, but counted.

Shape letters: R compared sequences, T compared positions, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.audit.passes import Pass
from lightning_moe.model import Decoder
from lightning_moe.model.moe_layers import named_moe_layers
from lightning_moe.routing import Phase

#: τ relative to the root mean square of a layer's logits. The audit runs in float64 but for the router, the rotary
#: embedding and the logits themselves, which are fp32 in every precision: their relative rounding is 1e-7 to 1e-6.
RELATIVE_TOLERANCE = 1e-5
OUTPUT = "output"


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
    """One check in one place: a MoE layer, or the output.

    Args:
        check: name of the check, such as ``future token``.
        where: name of the layer, or ``output``.
        num_choices: number of choices of an expert for a token that were compared (0 for the output).
        num_changed: number of choices that differ, without ties.
        num_ties: number of choices that differ within the tolerance.
        num_unjudged: number of tokens that are not judged, because they follow a tie.
        largest: largest change of a logit (absolute).
        tolerance: τ of that comparison, absolute.
        largest_at: place of the largest change.
        changed_at: place of the first changed choice; `None` if there is none.
    """

    check: str
    where: str
    num_choices: int
    num_changed: int
    num_ties: int
    num_unjudged: int
    largest: float
    tolerance: float
    largest_at: Place
    changed_at: Place | None

    @property
    def leaks(self) -> bool:
        """Whether rounding does not explain what changed."""
        return self.num_changed > 0 or self.largest > self.tolerance

    def merged(self, other: Finding) -> Finding:
        """Return the sum of this finding and that of another variant of the same check."""
        worst = max(self, other, key=lambda finding: finding.largest - finding.tolerance)
        return Finding(
            self.check,
            self.where,
            self.num_choices + other.num_choices,
            self.num_changed + other.num_changed,
            self.num_ties + other.num_ties,
            self.num_unjudged + other.num_unjudged,
            worst.largest,
            worst.tolerance,
            worst.largest_at,
            self.changed_at or other.changed_at,
        )


@dataclass(frozen=True)
class Comparison:
    """Two passes and the tokens that they share.

    Args:
        check: name of the check.
        variant: description of the change, for the report.
        reference: pass with the text as it is.
        changed: pass with the change.
        rows: int64 [R], sequences of the reference that are compared.
        changed_rows: int64 [R], the same sequences in the other pass.
        length: number T of positions that are compared, from the first on.
    """

    check: str
    variant: str
    reference: Pass
    changed: Pass
    rows: Tensor
    changed_rows: Tensor
    length: int

    def findings(self, decoder: Decoder, phase: Phase) -> list[Finding]:
        """Return one finding for each MoE layer from bottom to top, and one for the output."""
        judged = torch.ones(len(self.rows), self.length, dtype=torch.bool)
        found = []
        for name, layer in named_moe_layers(decoder).items():
            all_logits = self.reference.router_logits[name]
            logits, mask = self._of_reference(all_logits), self._of_reference(self.reference.masks[name])
            new_logits = self._of_changed(self.changed.router_logits[name])
            new_mask = self._of_changed(self.changed.masks[name])
            tolerance = RELATIVE_TOLERANCE * _rms(logits)
            moved = all_logits.clone()
            moved[self.rows, : self.length] += tolerance * (new_mask.float() - mask.float())
            again = self._of_reference(layer.rule.select(moved, layer.state, phase).mask)
            differs = (mask != new_mask) & judged.unsqueeze(-1)
            tie = differs & (again == new_mask)
            found.append(self._finding(name, logits, new_logits, tolerance, judged, differs & ~tie, tie))
            after_tie = tie.any(-1).cumsum(1) > 0  # attention carries it to the later positions
            judged = judged & ~after_tie
        logits, new_logits = self._of_reference(self.reference.output), self._of_changed(self.changed.output)
        none = torch.zeros_like(judged).unsqueeze(-1)[..., :0]
        tolerance = RELATIVE_TOLERANCE * _rms(logits)
        return [*found, self._finding(OUTPUT, logits, new_logits, tolerance, judged, none, none)]

    def _of_reference(self, values: Tensor) -> Tensor:
        return values[self.rows, : self.length]

    def _of_changed(self, values: Tensor) -> Tensor:
        return values[self.changed_rows, : self.length]

    def _finding(
        self,
        where: str,
        logits: Tensor,
        new_logits: Tensor,
        tolerance: float,
        judged: Tensor,
        changed: Tensor,
        tie: Tensor,
    ) -> Finding:
        """Count, with ``logits`` [R, T, E or V]; ``judged`` bool [R, T]; ``changed`` and ``tie`` bool [R, T, E]."""
        change = (new_logits - logits).abs().amax(-1) * judged  # [R, T]
        first = changed.any(-1).nonzero()
        return Finding(
            check=self.check,
            where=where,
            num_choices=int(judged.sum()) * changed.shape[-1],
            num_changed=int(changed.sum()),
            num_ties=int(tie.sum()),
            num_unjudged=int((~judged).sum()),
            largest=float(change.max()),
            tolerance=tolerance,
            largest_at=self._place(*divmod(int(change.argmax()), self.length)),
            changed_at=self._place(*first[0].tolist()) if len(first) else None,
        )

    def _place(self, row: int, position: int) -> Place:
        return Place(int(self.rows[row]), position, self.variant)


def merge(findings: Iterable[Finding]) -> list[Finding]:
    """Return one finding for each check and place, in the order of their first appearance."""
    merged: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        key = finding.check, finding.where
        merged[key] = merged[key].merged(finding) if key in merged else finding
    return list(merged.values())


def _rms(logits: Tensor) -> float:
    return float(logits.double().square().mean().sqrt())
