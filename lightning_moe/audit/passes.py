"""Forward passes of a decoder, with what every MoE layer did in them.

Shape letters: B sequences, S tokens, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.model import Decoder
from lightning_moe.model.moe_layers import named_moe_layers


@dataclass(frozen=True)
class Pass:
    """The result of one pass over [B, S] tokens.

    Args:
        router_logits: fp32 [B, S, E] of each MoE layer, by name, from bottom to top.
        masks: bool [B, S, E] of the same layers, the chosen experts.
        output: fp32 [B, S, V], logits of the next token.
    """

    router_logits: dict[str, Tensor]
    masks: dict[str, Tensor]
    output: Tensor


def full_pass(decoder: Decoder, input_ids: Tensor) -> Pass:
    """Run all of ``input_ids`` int64 [B, S] at once."""
    return _finite(_collect(decoder, decoder(input_ids).logits))


def decoding_pass(decoder: Decoder, input_ids: Tensor, steps: Sequence[int]) -> Pass:
    """Run the same tokens through the key/value cache, ``steps`` tokens at a time (their sum is S)."""
    cache = decoder.new_cache(input_ids.shape[0])
    parts = [_collect(decoder, decoder(new, cache).logits) for new in torch.split(input_ids, list(steps), dim=1)]
    names = parts[0].masks
    return _finite(
        Pass(
            {name: torch.cat([part.router_logits[name] for part in parts], dim=1) for name in names},
            {name: torch.cat([part.masks[name] for part in parts], dim=1) for name in names},
            torch.cat([part.output for part in parts], dim=1),
        )
    )


def _collect(decoder: Decoder, output: Tensor) -> Pass:
    logits, masks = {}, {}
    for name, layer in named_moe_layers(decoder).items():
        assert layer.record is not None
        logits[name], masks[name] = layer.record.logits, layer.record.selection.mask
    return Pass(logits, masks, output)


def _finite(result: Pass) -> Pass:
    for name, logits in [*result.router_logits.items(), ("output", result.output)]:
        if not logits.isfinite().all():
            raise UserError(f"{name}: the checkpoint computes logits that are not finite; there is nothing to compare.")
    return result
