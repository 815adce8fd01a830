"""Released models of the transformers library as `CausalLM`: their routers read, dialled, replaced and trained.

`route_by_thresholds` is for programs of your own: it changes how a model of `transformers` routes, in place.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_moe.hf.load import load_model, open_model
from lightning_moe.hf.model import TransformersLM
from lightning_moe.hf.released import ReleasedTopK
from lightning_moe.hf.sidecar import read_sidecar, use_sidecar, write_sidecar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "ReleasedTopK",
    "TransformersLM",
    "load_model",
    "open_model",
    "read_sidecar",
    "route_by_thresholds",
    "use_sidecar",
    "write_sidecar",
]


def route_by_thresholds(model: PreTrainedModel, folder: str | Path) -> TransformersLM:
    """Let a model of the transformers library route by the thresholds in a folder, in every later call of it.

    Args:
        model: the model, as ``from_pretrained`` gave it.
        folder: folder that ``calibrate --model`` wrote.

    Returns:
        The model under this package's interface: its ``layers`` hold the records of the last pass.

    Raises:
        UserError: the thresholds belong to another model.
    """
    lm = TransformersLM(model)
    use_sidecar(lm, read_sidecar(Path(folder)))
    return lm
