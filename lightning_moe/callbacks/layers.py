"""Finding the MoE layers of any LightningModule: the callbacks ask nothing else of it."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from lightning_moe.model.moe import MoELayer


def named_moe_layers(module: nn.Module) -> dict[str, MoELayer]:
    """The MoE layers in forward order, under the names that metrics use: ``layer_03`` for ``…blocks.3.moe``.

    A layer whose path has no number is named by its position among the MoE layers.
    """
    layers = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, MoELayer)]
    names: dict[str, MoELayer] = {}
    for position, (path, layer) in enumerate(layers):
        numbers = [part for part in path.split(".") if part.isdigit()]
        name = f"layer_{int(numbers[-1]) if numbers else position:02d}"
        names[name if name not in names else f"layer_{position:02d}_{len(names)}"] = layer
    return names


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum of ``tensor`` over all ranks; the tensor itself with one process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor
