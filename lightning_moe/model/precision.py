"""The dtype that a model computes in, in the trainer's words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from lightning_moe.model.causal_lm import CausalLM

#: ``bf16-mixed`` is autocast over weights in fp32; the others say what the weights are in
Precision = Literal["32-true", "bf16-mixed", "bf16-true"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@contextmanager
def computing_in(model: CausalLM, precision: Precision | None) -> Iterator[None]:
    """Let a model compute in another precision inside this context. Routers and routing state stay in fp32.

    Args:
        model: model; its weights change their dtype for good, and are rounded by ``bf16-true``.
        precision: precision; `None` leaves everything as it is.
    """
    if precision is None:
        yield
        return
    model.to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        yield


def precision_of(model: CausalLM) -> str:
    """Return the precision that a model computes in here: a `Precision`, or a dtype such as ``float16``."""
    device = model.device.type
    if torch.is_autocast_enabled(device):
        return "bf16-mixed" if torch.get_autocast_dtype(device) is torch.bfloat16 else "16-mixed"
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
    return {None: "32-true", torch.bfloat16: "bf16-true"}.get(dtype, str(dtype).removeprefix("torch."))
