"""The checks: what each changes around a token whose own past stays the same.

Shape letters: B sequences, S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_moe.audit.compare import Comparison, Finding, merge
from lightning_moe.audit.passes import Pass, decoding_pass, full_pass
from lightning_moe.errors import UserError
from lightning_moe.model import Decoder
from lightning_moe.model.moe_layers import in_phase
from lightning_moe.routing import Phase

NUM_CUTS = 8  # number of positions from which the future is replaced; the last token alone is one of them
PADDING = 0  # <|endoftext|>


def audit(decoder: Decoder, input_ids: Tensor, phase: Phase = Phase.CAUSAL, seed: int = 1) -> list[Finding]:
    """Run every check on real text.

    The checks are ``future token``, ``other sequences``, ``batch size``, ``padding``, and in the causal phase
    ``decoding`` (with the key/value cache).

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
        return merge(
            finding
            for comparison in _comparisons(decoder, input_ids, phase, torch.Generator().manual_seed(seed))
            for finding in comparison.findings(decoder, phase)
        )


def _comparisons(decoder: Decoder, ids: Tensor, phase: Phase, generator: torch.Generator) -> Iterator[Comparison]:
    (batch, length), every = ids.shape, torch.arange(ids.shape[0])
    reference = full_pass(decoder, ids)

    def noise() -> Tensor:
        return torch.randint(decoder.config.vocab_size, ids.shape, generator=generator, device="cpu").to(ids.device)

    for cut in sorted({1 + round(i * (length - 2) / (NUM_CUTS - 1)) for i in range(NUM_CUTS)}):
        changed = full_pass(decoder, torch.cat([ids[:, :cut], noise()[:, cut:]], dim=1))
        yield Comparison("future token", f"tokens from {cut} on replaced", reference, changed, every, every, cut)

    rows = sorted({0, batch // 2, batch - 1})
    for row in rows:
        changed = full_pass(decoder, torch.where(every.unsqueeze(1) == row, ids, noise()))
        at = torch.tensor([row])
        yield Comparison("other sequences", f"all but sequence {row} replaced", reference, changed, at, at, length)

    for kept in (*(every[row : row + 1] for row in rows), every[: batch // 2], every[batch // 2 :]):
        try:
            changed = full_pass(decoder, ids[kept])
        except UserError:
            if phase is Phase.CAUSAL:
                raise
            continue  # a training rule may need several sequences (pools of n)
        variant = f"batch of {len(kept)} instead of {batch}"
        yield Comparison("batch size", variant, reference, changed, kept, torch.arange(len(kept)), length)

    for end in sorted({max(1, length // 4), length // 2, length - 1}):
        short = full_pass(decoder, ids[:, :end])
        padded = ids.clone()
        padded[:, end:] = PADDING
        variant = f"{length - end} tokens of padding after {end}"
        yield Comparison("padding", variant, short, full_pass(decoder, padded), every, every, end)
        yield Comparison("padding", f"cut to {end} of {length} tokens", reference, short, every, every, end)

    if phase is Phase.CAUSAL:  # decoding is always causal
        for variant, steps in (("token by token", [1] * length), ("in growing chunks", _growing(length))):
            yield _decoding(decoder, ids, reference, variant, steps)


def _decoding(decoder: Decoder, ids: Tensor, reference: Pass, variant: str, steps: list[int]) -> Comparison:
    every = torch.arange(ids.shape[0])
    changed = decoding_pass(decoder, ids, steps)
    return Comparison("decoding", variant, reference, changed, every, every, ids.shape[1])


def _growing(length: int) -> list[int]:
    """Return 1, 2, 3, … tokens that sum to ``length``, as if a prompt arrived in parts."""
    steps: list[int] = []
    while sum(steps) < length:
        steps.append(min(len(steps) + 1, length - sum(steps)))
    return steps
