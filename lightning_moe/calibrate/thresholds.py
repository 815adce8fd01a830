"""Thresholds from the quantiles of the router's scores on text, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.model import CausalLM, RoutedLayer
from lightning_moe.model.moe_layers import named_moe_layers
from lightning_moe.routing.streamed import streamed_kth_largest


class _LayerReached(Exception):
    """Ends a forward pass after the layer whose logits are wanted."""


@torch.no_grad()
def calibrate(decoder: CausalLM, batches: Callable[[], Iterable[Tensor]]) -> None:
    """Set the thresholds of every MoE layer to the exact k-th largest scores on the text (`set_thresholds`).

    A layer's logits depend on how the layers below it route. So the text is read once per MoE layer, and each reading
    ends at that layer. Three readings take the place of one where the scores of one layer, 4 bytes per expert and
    token, take more than `routing.streamed.MEMORY`.

    Args:
        decoder: decoder whose rule chooses by thresholds, in ``eval()``.
        batches: function that starts a reading of the text, in batches int64 [B, S].

    Raises:
        UserError: the model computes router logits that are NaN.
    """
    for name, layer in named_moe_layers(decoder).items():
        rates = [layer.state.rate, *layer.rule.sketch_rates(layer.state.rate)]

        def read(name: str = name, layer: RoutedLayer = layer) -> Iterator[Tensor]:
            for logits in _logits(decoder, layer, batches()):
                if logits.isnan().any():
                    raise UserError(f"{name}: the model computes router logits that are NaN on this text.")
                scores = layer.rule.pool_scores(logits, layer.state).cpu()
                yield scores.reshape(-1, 1 if layer.rule.shares_cutoff else scores.shape[-1])

        layer.rule.set_thresholds(layer.state, streamed_kth_largest(read, rates))


def _logits(decoder: CausalLM, layer: RoutedLayer, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the router logits fp32 [B, S, E] of a layer; what comes after it is not computed."""

    def stop(*_: object) -> None:
        raise _LayerReached

    device = decoder.device
    for input_ids in batches:
        handle = layer.routing_module.register_forward_hook(stop)
        try:
            decoder(input_ids.to(device))
        except _LayerReached:
            pass
        finally:
            handle.remove()
        assert layer.record is not None
        yield layer.record.logits
