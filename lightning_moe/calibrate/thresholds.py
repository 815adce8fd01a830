"""Thresholds from the quantiles of the router's scores on text, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.hf.layer import TransformersLayer
from lightning_moe.hf.loads import ReleasedLoads
from lightning_moe.model import CausalLM, RoutedLayer
from lightning_moe.model.moe_layers import named_moe_layers
from lightning_moe.routing.streamed import streamed_kth_largest


class _LayerReached(Exception):
    """Ends a forward pass after the layer whose logits are wanted."""


@torch.no_grad()
def calibrate(decoder: CausalLM, batches: Callable[[], Iterable[Tensor]], keep_loads: bool = False) -> None:
    """Set the thresholds of every MoE layer to the exact k-th largest scores on the text (`set_thresholds`).

    A layer's logits depend on how the layers below it route. So the text is read once per MoE layer, and each reading
    ends at that layer. Three readings take the place of one where the scores of one layer, 4 bytes per expert and
    token, take more than `routing.streamed.MEMORY`.

    Args:
        decoder: decoder whose rule chooses by thresholds, in ``eval()``.
        batches: function that starts a reading of the text, in batches int64 [B, S].
        keep_loads: for a released model, whether each expert gets as many tokens as the model's own top-k with the same
            number of experts per token gives it, instead of all getting equally many.

    Raises:
        UserError: the model computes router logits that are NaN.
    """
    for name, layer in named_moe_layers(decoder).items():
        loads = ReleasedLoads(layer) if keep_loads and isinstance(layer, TransformersLayer) else None
        scores = _Scores(decoder, name, layer, batches, loads)
        rates = [layer.state.rate, *layer.rule.sketch_rates(layer.state.rate)]
        found = streamed_kth_largest(scores, rates if loads is None else partial(_shares, loads, layer, rates))
        layer.rule.set_thresholds(layer.state, found)


def _shares(loads: ReleasedLoads, layer: RoutedLayer, rates: Sequence[float]) -> Tensor:
    return torch.stack([loads.shares(rate * layer.state.num_experts) for rate in rates])


@dataclass
class _Scores:
    """Readings of the scores of one layer, fp32 [N, E], or [N·E, 1] for a rule whose experts share a cutoff."""

    decoder: CausalLM
    name: str
    layer: RoutedLayer
    batches: Callable[[], Iterable[Tensor]]
    loads: ReleasedLoads | None

    def __call__(self) -> Iterator[Tensor]:
        count, rule = self.loads is not None and not self.loads.num_tokens, self.layer.rule
        for logits in _logits(self.decoder, self.layer, self.batches()):
            if logits.isnan().any():
                raise UserError(f"{self.name}: the model computes router logits that are NaN on this text.")
            if count and self.loads is not None:  # in the first reading only
                self.loads.add(logits)
            scores = rule.pool_scores(logits, self.layer.state).cpu()
            yield scores.reshape(-1, 1 if rule.shares_cutoff else scores.shape[-1])


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
