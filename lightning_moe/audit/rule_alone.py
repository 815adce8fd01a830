"""The routing rule by itself, on many more tokens than text passes through the model.

A token's experts and gates must depend on its own logits and on stored numbers only. So they must stay if all tokens
are shuffled and put into other sequences and batches. This is cheap, so it covers rare tokens, long sequences and large
batches, and every token gets other neighbours. Some are also asked about a few at a time, because what all tokens have
in common, such as their mean, does not change when they are shuffled.

Shape letters: B sequences, S tokens, N tokens in all, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.audit.compare import RELATIVE_TOLERANCE, asked_again, count, rms
from lightning_moe.audit.findings import RULE_ALONE, Finding
from lightning_moe.audit.memory import changes, memory, state_findings
from lightning_moe.audit.passes import Pass, fresh
from lightning_moe.errors import UserError
from lightning_moe.model import CausalLM, RoutedLayer
from lightning_moe.model.moe_layers import named_moe_layers
from lightning_moe.routing import Phase

NUM_TOKENS = 2**16
MOST_LOGITS = 2**24  # of one layer: fewer tokens where there are more than 128 experts
REFERENCE_LENGTH = 32
LENGTHS = (1, 8, 64, 1024)  # of the sequences into which all tokens are shuffled; also one that holds all tokens
FEW = ((1, 1), (1, 64), (32, 2))  # numbers of sequences and tokens per sequence of the small batches
NUM_SMALL_BATCHES = 64


@dataclass(frozen=True)
class Alone:
    """What the rule of each layer does to some tokens, by the layer's name.

    Args:
        length: length of the sequences in which the tokens were.
        asked: bool [N], the tokens.
        masks: bool [N, E], the chosen experts.
        gates: fp32 [N, E], weights of the experts; 0 for those that are not chosen.
        changed_state: names of the state that differs afterwards, by place.
    """

    length: int
    asked: Tensor
    masks: dict[str, Tensor]
    gates: dict[str, Tensor]
    changed_state: dict[str, tuple[str, ...]]


def tokens_for(reference: Pass, generator: torch.Generator) -> dict[str, Tensor]:
    """Return logits fp32 [N, E] for each layer: those of the text, then normal ones of the same mean and deviation."""
    tokens = {}
    for name, logits in reference.router_logits.items():
        own = logits.flatten(0, 1)
        number = min(NUM_TOKENS, 2 ** int(math.log2(MOST_LOGITS / own.shape[1])))
        drawn = torch.randn(number, own.shape[1], generator=generator, device="cpu").to(own.device)
        drawn = own.mean(0) + drawn * own.std(0, correction=0)
        drawn[: len(own)] = own[:number]
        tokens[name] = drawn
    return tokens


def rule_alone(decoder: CausalLM, reference: Pass, phase: Phase, generator: torch.Generator) -> Iterator[Finding]:
    """Shuffle the tokens into sequences of several lengths, and yield what changes in each layer.

    Raises:
        UserError: the rule refuses a batch in the causal phase.
    """
    tokens = tokens_for(reference, generator)
    if not tokens:
        return
    number = len(next(iter(tokens.values())))
    shapes = [*((number // length, length) for length in (REFERENCE_LENGTH, *LENGTHS, number)), *FEW]
    original, expected = torch.arange(number), None
    for batch, length in shapes:
        order = torch.randperm(number, generator=generator, device="cpu").to(original.device)
        try:
            found = _route(decoder, tokens, original if expected is None else order, batch, length)
        except UserError:
            if phase is Phase.CAUSAL:
                raise
            continue  # a training rule may need several sequences (pools of n)
        yield from state_findings(decoder, found.changed_state, phase, (batch, length))
        if expected is None:
            expected = found
            continue
        for name, layer in named_moe_layers(decoder).items():
            yield _finding(name, layer, tokens[name], expected, found, phase, (batch, length))


def _route(decoder: CausalLM, tokens: dict[str, Tensor], order: Tensor, batch: int, length: int) -> Alone:
    decoder = fresh(decoder)
    before = memory(decoder)
    chosen = order[: batch * length * NUM_SMALL_BATCHES]
    parts = torch.split(chosen, batch * length)
    asked = torch.zeros(len(order), dtype=torch.bool)
    asked[chosen] = True
    masks, gates = {}, {}
    for name, layer in named_moe_layers(decoder).items():
        masks[name] = torch.zeros_like(tokens[name], dtype=torch.bool)
        gates[name] = torch.zeros_like(tokens[name])
        for part in parts:
            logits = tokens[name][part].view(batch, length, -1)
            mask = layer.rule.select(logits, layer.state, layer.phase).mask
            masks[name][part] = mask.flatten(0, 1)
            # of the same tensor as in a pass, because a rule could write to it
            gates[name][part] = (layer.gates(logits, mask) * mask).flatten(0, 1)
    return Alone(length, asked, masks, gates, changes(before, memory(decoder)))


def _finding(
    name: str, layer: RoutedLayer, tokens: Tensor, expected: Alone, found: Alone, phase: Phase, shape: tuple[int, int]
) -> Finding:
    mask, new_mask = expected.masks[name], found.masks[name]
    differs = (mask != new_mask) & found.asked[:, None]
    tie = differs
    if differs.any():
        as_expected = -1, expected.length, tokens.shape[1]  # the shape in which the rule was asked first
        logits, old, new, changed = (tensor.view(as_expected) for tensor in (tokens, mask, new_mask, differs))
        same = asked_again(layer, logits, old, new, changed, RELATIVE_TOLERANCE * rms(tokens), phase)
        tie = differs & same.reshape(differs.shape)
    tolerance = RELATIVE_TOLERANCE * rms(expected.gates[name])
    judged = found.asked & ~tie.any(-1)
    change = (found.gates[name] - expected.gates[name]).abs().amax(-1) * judged
    about = Finding(RULE_ALONE, name, phase, frozenset({shape}), tolerance=tolerance)
    numbers = change, differs & ~tie, tie, judged, found.asked
    variant = f"shuffled, {shape[0]} sequences of {shape[1]} tokens at a time"
    return count(about, variant, torch.zeros(1, dtype=torch.int64), *(tensor[None] for tensor in numbers))
