"""Comparison of two passes in which the compared tokens and their past are the same.

Only rounding may differ, because a matmul of another shape adds in another order. So logits must agree within a
tolerance τ. Choices of experts must agree, except for *ties*: a choice that changes because a logit is within τ of the
value where the rule decides. The rule itself says whether a changed choice is a tie: it is asked again with the
reference's logits and state, where only the changed logits are moved by τ in the direction of the change, and for a tie
it must make the new choice. For thresholds that means |logit − threshold| < τ, for token choice a gap of less than 2 τ
between the k-th and the next.

Tokens after a tie (in higher layers, at that position and later ones of the sequence) rightly differ. They are not
judged, but counted.

Shape letters: B sequences, S tokens, R compared sequences, T compared positions, E experts, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_moe.audit.findings import OUTPUT, Finding, Place
from lightning_moe.audit.passes import Pass
from lightning_moe.model import CausalLM, RoutedLayer
from lightning_moe.model.moe_layers import named_moe_layers
from lightning_moe.routing import Phase

#: τ relative to the root mean square of a layer's logits. The audit runs in float64 but for the router, the rotary
#: embedding and the logits themselves, which are fp32 in every precision: their relative rounding is 1e-7 to 1e-6.
RELATIVE_TOLERANCE = 1e-5


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
        lengths: int64 [R], number of positions that are compared of each sequence, from the first on.
    """

    check: str
    variant: str
    reference: Pass
    changed: Pass
    rows: Tensor
    changed_rows: Tensor
    lengths: Tensor

    def findings(self, decoder: CausalLM, phase: Phase) -> list[Finding]:
        """Return one finding for each MoE layer from bottom to top, and one for the output.

        ``decoder`` has the state that both passes began with.
        """
        shared = torch.arange(int(self.lengths.max())) < self.lengths[:, None]  # [R, T]
        judged, found = shared.clone(), []
        for name, layer in named_moe_layers(decoder).items():
            logits, new_logits = self._shared(self.reference.router_logits[name], self.changed.router_logits[name])
            mask, new_mask = self._shared(self.reference.masks[name], self.changed.masks[name])
            tolerance = RELATIVE_TOLERANCE * rms(logits)
            differs = (mask != new_mask) & judged[..., None]
            tie = differs & self._is_tie(name, layer, differs, tolerance, phase)
            change = (new_logits - logits).abs().amax(-1) * judged
            about = Finding(self.check, name, phase, self._shapes, tolerance=tolerance)
            found.append(count(about, self.variant, self.rows, change, differs & ~tie, tie, judged, shared))
            judged = judged & (tie.any(-1).cumsum(1) == 0)  # attention carries it to the later positions
        logits, new_logits = self._shared(self.reference.output, self.changed.output)
        change, none = (new_logits - logits).abs().amax(-1) * judged, judged[..., None][..., :0]
        about = Finding(self.check, OUTPUT, phase, self._shapes, tolerance=RELATIVE_TOLERANCE * rms(logits))
        return [*found, count(about, self.variant, self.rows, change, none, none, judged, shared)]

    @property
    def _shapes(self) -> frozenset[tuple[int, int]]:
        return frozenset({self.reference.shape, self.changed.shape})

    def _is_tie(self, name: str, layer: RoutedLayer, differs: Tensor, tolerance: float, phase: Phase) -> Tensor:
        """Return where the rule makes the new choice for logits that are moved by the tolerance; bool [R, T, E]."""
        if not differs.any():
            return differs
        mask = self.reference.masks[name]
        new_mask, changes = mask.clone(), torch.zeros_like(mask)
        new_mask[self.rows, : differs.shape[1]] = self._shared(mask, self.changed.masks[name])[1]
        changes[self.rows, : differs.shape[1]] = differs
        same = asked_again(layer, self.reference.router_logits[name], mask, new_mask, changes, tolerance, phase)
        return same[self.rows, : differs.shape[1]]

    def _shared(self, of_reference: Tensor, of_changed: Tensor) -> tuple[Tensor, Tensor]:
        length = int(self.lengths.max())
        return of_reference[self.rows, :length], of_changed[self.changed_rows, :length]


def count(
    about: Finding,
    variant: str,
    rows: Tensor,
    change: Tensor,
    changed: Tensor,
    tie: Tensor,
    judged: Tensor,
    shared: Tensor,
) -> Finding:
    """Fill in what one variant of a check saw.

    Args:
        about: finding with check, place, phase, shapes and tolerance.
        variant: description of the variant.
        rows: int64 [R], numbers of the sequences.
        change: fp [R, T], largest change of a number of each token; 0 where it is not judged.
        changed: bool [R, T, E], choices that leak.
        tie: bool [R, T, E], choices that tie.
        judged: bool [R, T], tokens that are judged.
        shared: bool [R, T], tokens that should be.
    """

    def place(row: int, position: int) -> Place:
        return Place(int(rows[row]), position, variant)

    first = changed.any(-1).nonzero()
    return replace(
        about,
        num_sequences=len(rows),
        num_tokens=int(shared.sum()),
        num_choices=int(judged.sum()) * changed.shape[-1],
        num_changed=int(changed.sum()),
        num_ties=int(tie.sum()),
        num_unjudged=int((shared & ~judged).sum()),
        largest=float(change.max()),
        largest_at=place(*divmod(int(change.argmax()), change.shape[1])),
        changed_at=place(*first[0].tolist()) if len(first) else None,
    )


def asked_again(
    layer: RoutedLayer, logits: Tensor, mask: Tensor, new_mask: Tensor, differs: Tensor, tolerance: float, phase: Phase
) -> Tensor:
    """Return where the layer's rule makes the new choice if only the logits of changed choices move by the tolerance.

    Args:
        layer: layer with the state of the reference; it is asked as a copy.
        logits: fp32 [B, S, E] of the reference.
        mask: bool [B, S, E], the choice for them.
        new_mask: bool [B, S, E], the other choice.
        differs: bool [B, S, E], where the two differ and are compared.
        tolerance: how far the logits move towards the other choice.
        phase: phase of the routing.
    """
    moved = logits + tolerance * differs * (new_mask.float() - mask.float())
    rule, state = copy.deepcopy((layer.rule, layer.state))
    return rule.select(moved, state, phase).mask == new_mask


def rms(values: Tensor) -> float:
    """Return the root mean square."""
    return float(values.double().square().mean().sqrt())
