"""Finding the MoE layers of a module, and choosing the phase in which they route."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_moe.model.routed_layer import RoutedLayer
from lightning_moe.routing.base import Phase


def named_moe_layers(module: nn.Module) -> dict[str, RoutedLayer]:
    """Return the MoE layers in forward order, under the names that metrics use: ``layer_03`` for ``…blocks.3.moe``.

    A layer whose path has no number is named by its position among the MoE layers.
    """
    layers = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, RoutedLayer)]
    names: dict[str, RoutedLayer] = {}
    for position, (path, layer) in enumerate(layers):
        numbers = [part for part in path.split(".") if part.isdigit()]
        name = f"layer_{int(numbers[-1]) if numbers else position:02d}"
        names[name if name not in names else f"layer_{position:02d}_{len(names)}"] = layer
    return names


@contextmanager
def in_phase(module: nn.Module, phase: Phase) -> Iterator[None]:
    """Let the module's forward passes route as in ``phase``, without gradients, and restore its mode afterwards."""
    layers = list(named_moe_layers(module).values())
    before = module.training, [layer.train_phase for layer in layers]
    module.train(phase is not Phase.CAUSAL)
    for layer in layers:
        layer.train_phase = phase if phase is not Phase.CAUSAL else layer.train_phase
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(before[0])
        for layer, train_phase in zip(layers, before[1], strict=True):
            layer.train_phase = train_phase


@contextmanager
def replay(module: nn.Module, experts: Sequence[Tensor]) -> Iterator[None]:
    """Let every token take the given experts, whatever the rule would choose; the gates are those of the pass itself.

    Args:
        module: model with MoE layers.
        experts: chosen experts of each MoE layer in forward order, bool [B, S, E], for the batch of the passes inside.
    """
    layers = list(named_moe_layers(module).values())
    try:
        for layer, mask in zip(layers, experts, strict=True):
            layer.replayed = mask
        yield
    finally:
        for layer in layers:
            layer.replayed = None
