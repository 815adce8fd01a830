"""The compute dial: another mean number of experts per token at inference, without retraining."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from lightning_moe.errors import UserError
from lightning_moe.model.causal_lm import CausalLM


@contextmanager
def inference_num_experts_per_token(decoder: CausalLM, value: float | Sequence[float] | None) -> Iterator[None]:
    """Let ``decoder`` route to another number of experts per token in `Phase.CAUSAL`, inside this context.

    Threshold rules (ET, EC) take their thresholds from the sketch in their state, token choice takes more or fewer
    experts. The state is restored afterwards. Do not train or save inside the context.

    Args:
        decoder: decoder with routing state from training.
        value: experts per token, one value for all MoE layers or one for each; `None` changes nothing.

    Raises:
        UserError: the decoder is dense, the values do not fit its layers, or a rule cannot serve them.
    """
    if value is None:
        yield
        return
    layers = list(decoder.moe_layers())
    if not layers:
        raise UserError(f"inference_num_experts_per_token={value}: the dense model has no experts to choose from.")
    given = value if isinstance(value, Sequence) else [value]
    each = list(given) * (len(layers) if len(given) == 1 else 1)
    if len(each) != len(layers):
        raise UserError(
            f"inference_num_experts_per_token={list(each)}: give one number, or one for each of the {len(layers)} "
            "MoE layers."
        )
    before = [
        ({name: buffer.clone() for name, buffer in layer.state.named_buffers()}, layer.state.num_experts_per_token)
        for layer in layers
    ]
    try:
        with torch.no_grad():
            for layer, number in zip(layers, each, strict=True):
                if not 0 < number <= layer.state.num_experts:
                    raise UserError(
                        f"inference_num_experts_per_token={number:g}: must be above 0 and at most "
                        f"{layer.state.num_experts}."
                    )
                layer.rule.set_inference_num_experts_per_token(layer.state, number)
        yield
    finally:
        with torch.no_grad():
            for layer, (buffers, trained) in zip(layers, before, strict=True):
                layer.state.num_experts_per_token = trained
                for name, buffer in buffers.items():
                    layer.state[name].copy_(buffer)
