"""Forward passes of a decoder, with what every MoE layer did in them.

Every pass runs on a copy, so that all begin with the same state whatever the passes before them left behind. The copies
share the parameters.

Shape letters: B sequences, S tokens, E experts, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_moe.audit.memory import changes, memory
from lightning_moe.errors import UserError
from lightning_moe.model import CausalLM
from lightning_moe.model.moe_layers import named_moe_layers


@dataclass(frozen=True)
class Pass:
    """The result of one pass over [B, S] tokens.

    Args:
        router_logits: fp32 [B, S, E] of each MoE layer, by name, from bottom to top.
        masks: bool [B, S, E] of the same layers, the chosen experts.
        output: fp32 [B, S, V], logits of the next token.
        changed_state: names of the state that differs after the pass, by place.
    """

    router_logits: dict[str, Tensor]
    masks: dict[str, Tensor]
    output: Tensor
    changed_state: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers B and S."""
        return self.output.shape[0], self.output.shape[1]


def fresh(decoder: CausalLM) -> CausalLM:
    """Return a copy with the same parameters, and with state of its own."""
    return copy.deepcopy(decoder, {id(parameter): parameter for parameter in decoder.parameters()})


def full_pass(decoder: CausalLM, input_ids: Tensor, after: Tensor | None = None) -> Pass:
    """Run all of ``input_ids`` int64 [B, S] at once, on the same copy ``after`` other tokens, if any are given."""
    decoder = fresh(decoder)
    if after is not None:
        decoder(after)
    before = memory(decoder)
    result = _collect(decoder, decoder(input_ids).logits)
    return _finite(replace(result, changed_state=changes(before, memory(decoder))))


def decoding_pass(decoder: CausalLM, input_ids: Tensor, steps: Sequence[int]) -> Pass:
    """Run the same tokens through the key/value cache, ``steps`` tokens at a time (their sum is S)."""
    decoder = fresh(decoder)
    cache = decoder.new_cache(input_ids.shape[0])
    before = memory(decoder)
    parts = [_collect(decoder, decoder(new, cache).logits) for new in torch.split(input_ids, list(steps), dim=1)]
    return _finite(
        Pass(
            {name: torch.cat([part.router_logits[name] for part in parts], dim=1) for name in parts[0].masks},
            {name: torch.cat([part.masks[name] for part in parts], dim=1) for name in parts[0].masks},
            torch.cat([part.output for part in parts], dim=1),
            changes(before, memory(decoder)),
        )
    )


def _collect(decoder: CausalLM, output: Tensor) -> Pass:
    logits, masks = {}, {}
    for name, layer in named_moe_layers(decoder).items():
        assert layer.record is not None
        logits[name], masks[name] = layer.record.logits.clone(), layer.record.selection.mask.clone()
    return Pass(logits, masks, output)


def _finite(result: Pass) -> Pass:
    for name, logits in [*result.router_logits.items(), ("output", result.output)]:
        if not logits.isfinite().all():
            raise UserError(f"{name}: the checkpoint computes logits that are not finite; there is nothing to compare.")
    return result
