"""Finding the MoE layers of a module, and choosing the phase in which they route."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_moe.model.moe import MoELayer
from lightning_moe.routing.base import Phase


def named_moe_layers(module: nn.Module) -> dict[str, MoELayer]:
    """Return the MoE layers in forward order, under the names that metrics use: ``layer_03`` for ``…blocks.3.moe``.

    A layer whose path has no number is named by its position among the MoE layers.
    """
    layers = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, MoELayer)]
    names: dict[str, MoELayer] = {}
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
