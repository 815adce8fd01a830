"""Tiny random models of the Mixture-of-Experts families of `transformers`, as objects and as folders on disk."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.helpers.hf_families import (
    CHOSEN,
    CONTEXT,
    DENSE,
    EXPERTS,
    FAMILIES,
    HIDDEN,
    OTHER_FAMILIES,
    make_config,
)
from tests.helpers.hf_tokenizers import TokenizerKind, make_tokenizer

__all__ = [
    "CHOSEN",
    "CONTEXT",
    "DENSE",
    "EXPERTS",
    "FAMILIES",
    "HIDDEN",
    "OTHER_FAMILIES",
    "make_config",
    "make_folder",
    "make_model",
]

_ROUTER = re.compile(r"(^|\.)(gate|router|router\.layer|gate\.wg)\.weight$")
_CHOICE_BIAS = re.compile(r"(^|\.)(e_score_correction_bias|expert_bias)$")


def make_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a random model in evaluation mode; everything a routing could depend on differs from its neutral value.

    Router logits have a standard deviation of about 1.5, so that choices are spread and ties are out of reach. The
    biases of choices have one of 0.2: they change some choices, not all. Other biases, norms and sinks are random, too.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(make_config(family), dtype=dtype)
        kept = set(model._keep_in_fp32_modules_strict or ())
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if kept.intersection(name.split(".")):  # from_config casts them, from_pretrained does not
                    tensor.data = tensor.data.float()
                _randomize(name, tensor)
    return model.eval()


def _randomize(name: str, tensor: torch.Tensor) -> None:
    if _ROUTER.search(name) and tensor.shape[0] > 1:  # a gate with one row is that of a shared expert
        nn.init.normal_(tensor, std=1.5 / HIDDEN**0.5)
    elif _CHOICE_BIAS.search(name):
        nn.init.normal_(tensor, std=0.2)
    elif name.endswith("norm.weight") or "layernorm" in name:
        tensor.add_(0.2 * torch.randn_like(tensor))
    elif ("bias" in name.rsplit(".", 1)[-1] and "dt_bias" not in name) or name.endswith(".sinks"):
        nn.init.normal_(tensor, std=0.2)


def make_folder(
    family: str,
    folder: Path,
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
    tokenizer: TokenizerKind | None = "byte_level",
    seed: int = 0,
) -> PreTrainedModel:
    """Save `make_model(family, seed, dtype)` as a transformers folder, and return it.

    Args:
        family: name in `FAMILIES`, `OTHER_FAMILIES`, or `DENSE`.
        folder: where to write; may exist.
        sharded: whether the weights are split over several safetensors files with an index.
        dtype: dtype of the weights in the files.
        tokenizer: kind of the tokenizer that is saved with it; None: no tokenizer.
        seed: random seed of the weights.
    """
    model = make_model(family, seed, dtype)
    model.save_pretrained(folder, max_shard_size="60KB" if sharded else "1GB")
    if tokenizer is not None:
        make_tokenizer(tokenizer).save_pretrained(folder)
    return model
