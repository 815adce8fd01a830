"""Released models of the transformers library as `CausalLM`: their routers read, dialled, replaced and trained."""

from lightning_moe.hf.load import load_model
from lightning_moe.hf.model import TransformersLM
from lightning_moe.hf.released import ReleasedTopK

__all__ = ["ReleasedTopK", "TransformersLM", "load_model"]
