"""Precision in the trainer's words: what the weights are in, and what the model computes in."""

import pytest
import torch

from lightning_moe.model import Decoder, DecoderConfig
from lightning_moe.model.precision import PRECISIONS, Precision, computing_in, precision_of
from lightning_moe.routing import ExpertThreshold


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_model_computes_in_the_precision_asked_for(precision: Precision) -> None:
    config = DecoderConfig(vocab_size=20, max_sequence_length=8, hidden_size=16, num_attention_heads=2, num_experts=4)
    model = Decoder(config, ExpertThreshold()).eval()
    seen: list[torch.dtype] = []
    block = model.blocks[-1]
    block.attention.query.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with computing_in(model, precision), torch.no_grad():
        assert precision_of(model) == precision
        model(torch.zeros(1, 4, dtype=torch.int64))
    assert seen == [torch.float32 if precision == "32-true" else torch.bfloat16]
    layer = next(model.moe_layers())
    assert layer.router.weight.dtype == layer.state["threshold"].dtype == torch.float32
    assert layer.record.logits.dtype == torch.float32
    with computing_in(model, None):
        assert precision_of(model) == ("bf16-true" if precision == "bf16-true" else "32-true")
    assert precision_of(model.half()) == "float16"
