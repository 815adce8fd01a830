"""The settings of a healing: which released model, which of its parameters are trained, and by which loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_moe.errors import UserError

#: ``routers``; ``norms``: weights and biases of all norms; ``lora``: low-rank adapters at the linear layers outside of
#: routers, experts and head (needs peft)
Part = Literal["routers", "norms", "lora"]
KEY = "model.pretrained"


@dataclass(frozen=True)
class PretrainedConfig:
    """A released model whose routers are trained for another routing rule, instead of a decoder made here.

    Args:
        path: folder or name of a model of the transformers library; null to train a decoder made here. The folder is
            only read.
        num_experts_per_token: mean number of routed experts per token that it is trained for; null means the model's
            own number.
        train: list of what is trained: routers, norms, lora. Everything else stays as it was released.
        distill: weight w of the distillation, from 0 to 1: the loss is (1 − w) · next-token loss + w · KL divergence
            from the untouched model with its released routing.
        temperature: temperature T of both distributions in the distillation, whose loss is multiplied by T².
        thresholds: folder of `calibrate --model`, whose thresholds the training starts from; null starts from those of
            an untrained router, so that a warm-up is needed (`threshold_warmup`).
        dtype: dtype of the weights that are not trained; trained ones are always fp32.
        lora_rank: rank of the adapters.
    """

    path: str | None = None
    num_experts_per_token: float | None = None
    train: list[Part] = field(default_factory=lambda: ["routers"])
    distill: float = 0.0
    temperature: float = 1.0
    thresholds: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora_rank: int = 8

    def __post_init__(self) -> None:
        unknown = [part for part in self.train if part not in get_args(Part)]
        if unknown or not self.train or len(set(self.train)) < len(self.train):
            raise UserError(
                f"{KEY}.train={list(self.train)}: must be a list of one or more of {', '.join(get_args(Part))}, "
                "each once"
            )
        if not 0 <= self.distill <= 1:
            raise UserError(f"{KEY}.distill={self.distill}: must be from 0 to 1")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f"{KEY}.temperature={self.temperature}: must be above 0")
        if self.lora_rank < 1:
            raise UserError(f"{KEY}.lora_rank={self.lora_rank}: must be at least 1")

    def check_num_experts_per_token(self, num_experts: int) -> None:
        """Raise `UserError` unless a model with so many experts can route to so many per token."""
        value = self.num_experts_per_token
        if value is not None and not 0 < value <= num_experts:
            raise UserError(
                f"{KEY}.num_experts_per_token={value:g}: the model has {num_experts} experts per MoE layer; must be "
                f"above 0 and at most {num_experts}"
            )


def local_folder(name: str) -> str:
    """Return the folder of a model that a checkpoint names, without asking any server for it.

    Raises:
        UserError: it is not on this machine.
    """
    if Path(name).expanduser().exists():
        return name
    try:
        from huggingface_hub import snapshot_download

        return str(snapshot_download(name, local_files_only=True))
    except Exception:  # of many kinds, by what the name looks like
        raise UserError(
            f"{KEY}.path={name}: the checkpoint holds what was trained of this model, and the model itself is not on "
            "this machine; put it there (a checkpoint does not decide what is fetched)"
        ) from None


#: keys of `PretrainedConfig` that decide which tensors a checkpoint holds
DECIDE_TENSORS = ("train", "lora_rank")


def differences(theirs: Mapping[str, Any] | None, ours: Mapping[str, Any] | None) -> Sequence[str]:
    """Return what keeps the checkpoint of one healing from being continued by another, in the words of a message.

    Args:
        theirs: entry ``pretrained`` of the checkpoint's hyper-parameters; `None` for a decoder made here.
        ours: the same of this run.
    """
    if theirs is None or ours is None:
        if theirs is ours:
            return []
        names = [
            "a decoder made here" if one is None else f"the released model {one['path']}" for one in (theirs, ours)
        ]
        return [f"{KEY}.path: checkpoint of {names[0]}, this run trains {names[1]}"]
    if theirs["digest"] != ours["digest"]:
        return [
            f"{KEY}.path={ours['path']}: its weights have the digest {ours['digest']}, but the checkpoint was trained "
            f"on {theirs['digest']} ({theirs['path']}): the model has changed, or is another one"
        ]
    return [
        f"{KEY}.{key}: checkpoint {theirs[key]!r}, this run {ours[key]!r}"
        for key in DECIDE_TENSORS
        if theirs[key] != ours[key] and (key != "lora_rank" or "lora" in theirs["train"])
    ]
