"""Thresholds from the quantiles of the router's logits on text, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lightning_moe.model import CausalLM, RoutedLayer
from lightning_moe.routing.pooling import pooled_kth_largest


class _LayerReached(Exception):
    """Ends a forward pass after the layer whose logits are wanted."""


@torch.no_grad()
def calibrate(decoder: CausalLM, batches: Callable[[], Iterable[Tensor]]) -> None:
    """Set the thresholds of every MoE layer to the exact k-th largest logits on the text (`set_thresholds`).

    A layer's logits depend on how the layers below it route. So the text is read once per MoE layer, and each reading
    ends at that layer. The logits of one layer are held in memory, 4 bytes per expert and token.

    Args:
        decoder: decoder whose rule has `CausalChoice.THRESHOLD`, in ``eval()``.
        batches: function that starts a reading of the text, in batches int64 [B, S].
    """
    for layer in decoder.moe_layers():
        rates = [layer.state.rate, *layer.rule.sketch_rates(layer.state.rate)]
        [cutoffs] = pooled_kth_largest([_logits(decoder, layer, batches())], [rates])
        layer.rule.set_thresholds(layer.state, cutoffs)


def _logits(decoder: CausalLM, layer: RoutedLayer, batches: Iterable[Tensor]) -> Tensor:
    """Return the router logits fp32 [tokens, E] of a layer; the layers above it are not computed."""

    def stop(*_: object) -> None:
        raise _LayerReached

    device = decoder.device
    handle = layer.register_forward_hook(stop)
    logits = []
    try:
        for input_ids in batches:
            try:
                decoder(input_ids.to(device))
            except _LayerReached:
                assert layer.record is not None
                logits.append(layer.record.logits.flatten(0, 1).cpu())
    finally:
        handle.remove()
    return torch.cat(logits)
