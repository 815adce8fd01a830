"""A digest of a released model, by which a checkpoint that does not hold the model knows it."""

from __future__ import annotations

import hashlib

import torch

from lightning_moe.hf.model import TransformersLM


def model_digest(lm: TransformersLM) -> str:
    """Return a digest of all weights and of how the released routers choose, 16 hex digits.

    It takes about 1 s per gigabyte. Another dtype of the same weights has another digest.

    Args:
        lm: model as it was loaded, before anything of it is trained.
    """
    digest = hashlib.sha256()
    for layer in lm.layers:
        digest.update(f"{layer.path} {layer.released} {layer.top_k} {layer.gating}\n".encode())
    for name, tensor in sorted(lm.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
