"""Thresholds from the quantiles of the router's scores on text, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lightning_moe.model import Decoder, MoELayer
from lightning_moe.routing.pooling import pooled_kth_largest


class _LayerReached(Exception):
    """Ends a forward pass behind the layer whose scores are wanted."""


@torch.no_grad()
def calibrate(decoder: Decoder, batches: Callable[[], Iterable[Tensor]]) -> None:
    """Set ``threshold``, ``sketch`` and ``cutoff`` of every MoE layer to the exact k-th largest scores on the text.

    Layer after layer, because a layer's scores depend on how the layers below it route: the text is read once per
    MoE layer, and each reading ends at that layer. One layer's scores are held in memory, 4 bytes per expert and
    token. The moving average counts as full (``ema_weight`` 1), so that training goes on from these thresholds.

    Args:
        decoder: with a threshold rule (`routing.threshold.ThresholdTracking`), in ``eval()``.
        batches: starts a reading of the text; gives int64 [B, S] batches.
    """
    for layer in decoder.moe_layers():
        rates = [layer.state.rate, *layer.rule.sketch_rates(layer.state.rate)]
        [cutoffs] = pooled_kth_largest([_scores(decoder, layer, batches())], [rates])
        layer.state["threshold"].copy_(cutoffs[0])
        layer.state["cutoff"].copy_(cutoffs[0])
        layer.state["sketch"].copy_(cutoffs[1:])
        layer.state["ema_weight"].fill_(1)


def _scores(decoder: Decoder, layer: MoELayer, batches: Iterable[Tensor]) -> Tensor:
    """The scores [tokens, E] of a layer; the layers above it are not computed."""

    def stop(*_: object) -> None:
        raise _LayerReached

    device = decoder.embedding.weight.device
    handle = layer.register_forward_hook(stop)
    scores = []
    try:
        for input_ids in batches:
            try:
                decoder(input_ids.to(device))
            except _LayerReached:
                assert layer.record is not None
                scores.append(layer.rule.pool_scores(layer.record.logits, layer.state).flatten(0, 1).cpu())
    finally:
        handle.remove()
    return torch.cat(scores)
