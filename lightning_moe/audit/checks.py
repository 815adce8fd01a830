"""The checks: what each changes around a token whose own past stays the same.

Shape letters: B sequences, S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_moe.audit.compare import Comparison
from lightning_moe.audit.findings import FUTURE, Finding, merge
from lightning_moe.audit.memory import state_findings
from lightning_moe.audit.passes import Pass, decoding_pass, full_pass
from lightning_moe.audit.rule_alone import rule_alone
from lightning_moe.errors import UserError
from lightning_moe.model import CausalLM
from lightning_moe.model.moe_layers import in_phase
from lightning_moe.routing import Phase

NUM_CUTS = 8  # number of positions of each sequence from which its future is replaced, beside the last token alone
PADDING = 0  # <|endoftext|>


def audit(decoder: CausalLM, input_ids: Tensor, phase: Phase = Phase.CAUSAL, seed: int = 1) -> list[Finding]:
    """Run every check on real text.

    The checks are ``state`` (what a pass leaves behind), ``repetition``, ``future token``, ``other sequences``, ``batch
    size``, ``padding``, in the causal phase ``decoding`` (with the key/value cache), and ``rule alone``. Each pass runs
    on a copy of the decoder, which shares its parameters, so the state of the decoder stays as it is.

    Args:
        decoder: model. Its weights must be float64 for the tolerance to hold (``decoder.double()``).
        input_ids: int64 [B, S] of text, B ≥ 2, S ≥ 4, on the model's device.
        phase: phase whose routing is audited.
        seed: random seed of the tokens that replace text.

    Returns:
        One finding for each check and place, see `Finding`.

    Raises:
        UserError: there are too few tokens, or the routing rule refuses a batch.
    """
    batch, length = input_ids.shape
    if batch < 2 or length < 4:
        raise UserError(f"text of {batch} × {length} tokens: the audit needs 2 sequences of 4 tokens, or more.")
    with in_phase(decoder, phase), input_ids.device:  # on which the comparisons make their tensors, too
        return merge(_findings(decoder, input_ids, phase, torch.Generator().manual_seed(seed)))


def _findings(decoder: CausalLM, ids: Tensor, phase: Phase, generator: torch.Generator) -> Iterator[Finding]:
    reference = full_pass(decoder, ids)
    yield from state_findings(decoder, reference.changed_state, phase, reference.shape)
    for comparison in _Checks(decoder, ids, phase, generator, reference).comparisons():
        changed = comparison.changed
        yield from state_findings(decoder, changed.changed_state, phase, changed.shape)
        yield from comparison.findings(decoder, phase)
    yield from rule_alone(decoder, reference, phase, generator)


@dataclass(frozen=True)
class _Checks:
    decoder: CausalLM
    ids: Tensor
    phase: Phase
    generator: torch.Generator
    reference: Pass

    def comparisons(self) -> Iterator[Comparison]:
        yield from self._repetition()
        yield from self._future()
        yield from self._other_sequences()
        yield from self._batch_size()
        yield from self._padding()
        if self.phase is Phase.CAUSAL:  # decoding is always causal
            yield from self._decoding()

    def _repetition(self) -> Iterator[Comparison]:
        for variant, after in (
            ("the same pass again", None),
            ("after a pass over the same text", self.ids),
            ("after a pass over other text", self._noise()),
        ):
            yield self._compare("repetition", variant, full_pass(self.decoder, self.ids, after))

    def _future(self) -> Iterator[Comparison]:
        batch, length = self.ids.shape
        steps = torch.arange(NUM_CUTS * batch, dtype=torch.float64) / (NUM_CUTS * batch - 1)
        spread = (1 + steps * (length - 2)).round().long().view(NUM_CUTS, batch)  # every sequence has its own cuts
        for cuts in (*spread, torch.full((batch,), length - 1)):
            changed = torch.where(torch.arange(length) < cuts[:, None], self.ids, self._noise())
            variant = f"tokens replaced from position {int(cuts.min())} to {int(cuts.max())} on"
            yield self._compare(FUTURE, variant, full_pass(self.decoder, changed), lengths=cuts)

    def _other_sequences(self) -> Iterator[Comparison]:
        for row in self._rows:
            for variant, others in (("replaced", self._noise()), ("padding", torch.full_like(self.ids, PADDING))):
                others[row] = self.ids[row]
                changed, at = full_pass(self.decoder, others), torch.tensor([row])
                yield self._compare("other sequences", f"all but sequence {row} {variant}", changed, at, at)

    def _batch_size(self) -> Iterator[Comparison]:
        batch, every = len(self.ids), self._every
        alone = [every[row : row + 1] for row in self._rows]
        for kept in (*alone, every[: batch // 2], every[batch // 2 :], every[1:], every):
            ids = self.ids[kept] if len(kept) < batch else torch.cat([self.ids, self._noise()])
            try:
                changed = full_pass(self.decoder, ids)
            except UserError:
                if self.phase is Phase.CAUSAL:
                    raise
                continue  # a training rule may need several sequences (pools of n)
            variant = f"batch of {len(ids)} instead of {batch}"
            yield self._compare("batch size", variant, changed, kept, torch.arange(len(kept)))

    def _padding(self) -> Iterator[Comparison]:
        batch, length = self.ids.shape
        for end in sorted({1, max(1, length // 4), length // 2, 3 * length // 4, length - 1}):
            ends = torch.full((batch,), end)
            short, padded = full_pass(self.decoder, self.ids[:, :end]), full_pass(self.decoder, self._padded(ends))
            variant = f"{length - end} tokens of padding after {end}"
            yield replace(self._compare("padding", variant, padded, lengths=ends), reference=short)
            yield self._compare("padding", f"cut to {end} of {length} tokens", short, lengths=ends)
        ends = 1 + self._every * (length - 2) // (batch - 1)
        padded = full_pass(self.decoder, self._padded(ends))
        yield self._compare("padding", "padding after another length in each sequence", padded, lengths=ends)

    def _decoding(self) -> Iterator[Comparison]:
        length = self.ids.shape[1]
        for variant, steps in (("token by token", [1] * length), ("in growing chunks", _growing(length))):
            yield self._compare("decoding", variant, decoding_pass(self.decoder, self.ids, steps))

    @property
    def _every(self) -> Tensor:
        return torch.arange(len(self.ids))

    @property
    def _rows(self) -> list[int]:
        return sorted({0, len(self.ids) // 2, len(self.ids) - 1})

    def _noise(self) -> Tensor:
        size = self.decoder.vocab_size
        return torch.randint(size, self.ids.shape, generator=self.generator, device="cpu").to(self.ids.device)

    def _padded(self, ends: Tensor) -> Tensor:
        return torch.where(torch.arange(self.ids.shape[1]) < ends[:, None], self.ids, PADDING)

    def _compare(
        self,
        check: str,
        variant: str,
        changed: Pass,
        rows: Tensor | None = None,
        changed_rows: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Comparison:
        """Compare with the reference, by default all sequences and all positions."""
        rows = self._every if rows is None else rows
        lengths = torch.full((len(rows),), self.ids.shape[1]) if lengths is None else lengths
        return Comparison(
            check, variant, self.reference, changed, rows, rows if changed_rows is None else changed_rows, lengths
        )


def _growing(length: int) -> list[int]:
    """Return 1, 2, 3, … tokens that sum to ``length``, as if a prompt arrived in parts."""
    steps: list[int] = []
    while sum(steps) < length:
        steps.append(min(len(steps) + 1, length - sum(steps)))
    return steps
