"""The dial for compute at inference: another mean number of experts per token, without retraining."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from lightning_moe.errors import UserError
from lightning_moe.model.decoder import Decoder


@contextmanager
def dialed(decoder: Decoder, num_experts_per_token: float | Sequence[float] | None) -> Iterator[None]:
    """In this context ``decoder`` routes to another number of experts per token in `Phase.CAUSAL`.

    Threshold rules (ET, EC) take their thresholds from the sketch in their state, token choice takes more or fewer
    experts. The state is as before afterwards; do not train or save meanwhile.

    Args:
        decoder: with routing state from training.
        num_experts_per_token: for all MoE layers, or one value for each; null leaves everything as it is.

    Raises:
        UserError: the decoder is dense, the values do not fit its layers, or a rule cannot serve them.
    """
    if num_experts_per_token is None:
        yield
        return
    layers = list(decoder.moe_layers())
    if not layers:
        raise UserError(
            f"num_experts_per_token={num_experts_per_token}: the dense model has no experts to choose from."
        )
    given = num_experts_per_token if isinstance(num_experts_per_token, Sequence) else [num_experts_per_token]
    each = list(given) * (len(layers) if len(given) == 1 else 1)
    if len(each) != len(layers):
        raise UserError(
            f"num_experts_per_token={list(each)}: give one number, or one for each of the {len(layers)} MoE layers."
        )
    before = [
        ({name: buffer.clone() for name, buffer in layer.state.named_buffers()}, layer.state.num_experts_per_token)
        for layer in layers
    ]
    try:
        with torch.no_grad():
            for layer, value in zip(layers, each, strict=True):
                if not 0 < value <= layer.state.num_experts:
                    raise UserError(
                        f"num_experts_per_token={value:g}: must be above 0 and at most {layer.state.num_experts}."
                    )
                layer.rule.set_rate(layer.state, value)
        yield
    finally:
        with torch.no_grad():
            for layer, (buffers, trained) in zip(layers, before, strict=True):
                layer.state.num_experts_per_token = trained
                for name, buffer in buffers.items():
                    layer.state[name].copy_(buffer)
