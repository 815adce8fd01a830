"""torch.compile of the blocks: the same numbers, one graph per kind of block and phase, none for a number of pairs."""

import copy

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from lightning_moe.model import Decoder, DecoderConfig, generate, next_token_loss
from lightning_moe.routing import ExpertThreshold, Phase, QuantileBalancing, RoutingRule, TokenChoiceAuxLoss

CONFIG = {
    "hidden_size": 32,
    "num_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_sequence_length": 32,
    "num_experts": 8,
}


def pair_of_decoders(rule: RoutingRule, **options: object) -> tuple[Decoder, Decoder]:
    """An eager decoder and its compiled copy, with no weight at zero."""
    eager = Decoder(DecoderConfig(**{**CONFIG, **options}), rule)
    for parameter in eager.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    compiled = copy.deepcopy(eager)
    compiled.compile_blocks()
    torch.compiler.reset()
    counters.clear()
    return eager, compiled


def loss_and_gradients(decoder: Decoder, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    decoder.zero_grad()
    output = decoder(ids)
    loss = next_token_loss(output.logits, ids).mean()
    (loss if output.aux_loss is None else loss + output.aux_loss).backward()
    return loss.detach(), [parameter.grad for parameter in decoder.parameters()]


def assert_same_training(eager: Decoder, compiled: Decoder, steps: int) -> set[int]:
    """Losses, gradients and masks; returns the numbers of chosen pairs that occurred."""
    sizes = set()
    for _ in range(steps):
        ids = torch.randint(0, 64, (4, 32))
        loss, gradients = loss_and_gradients(eager, ids)
        compiled_loss, compiled_gradients = loss_and_gradients(compiled, ids)
        torch.testing.assert_close(compiled_loss, loss, rtol=0, atol=1e-5)
        for gradient, compiled_gradient in zip(gradients, compiled_gradients, strict=True):
            torch.testing.assert_close(compiled_gradient, gradient, rtol=1e-4, atol=1e-6)
        for layer, compiled_layer in zip(eager.moe_layers(), compiled.moe_layers(), strict=True):
            assert torch.equal(layer.record.selection.mask, compiled_layer.record.selection.mask)
            sizes.add(int(layer.record.selection.mask.sum()))
    return sizes


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_compiled_is_eager_in_every_phase_without_a_break_or_a_graph_for_each_size(activation: str) -> None:
    eager, compiled = pair_of_decoders(ExpertThreshold(capacity_factor=None), activation=activation)
    graphs = []
    for phase in (Phase.WARMUP, Phase.TRAIN):
        for decoder in (eager, compiled):
            for layer in decoder.moe_layers():
                layer.train_phase = phase
        sizes = assert_same_training(eager, compiled, steps=5)
        assert len(sizes) >= (1 if phase is Phase.WARMUP else 5)  # other numbers of pairs in nearly every step
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [2, 3]  # the dense block and the MoE block; then the MoE block of the other phase
    for decoder in (eager, compiled):
        decoder.eval()
    ids = torch.randint(0, 64, (4, 32))
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, eager(ids).logits, rtol=0, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 5  # both once more, without gradients
    prompt = ids[:1, :4]
    assert torch.equal(generate(compiled, prompt, 8, temperature=0), generate(eager, prompt, 8, temperature=0))
    assert counters["stats"]["unique_graphs"] == 5
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [ExpertThreshold(), TokenChoiceAuxLoss(aux_loss_coef=0.1), QuantileBalancing()],
    ids=lambda r: type(r).__name__,
)
def test_compiled_rules_with_recomputation(rule: RoutingRule) -> None:
    eager, compiled = pair_of_decoders(rule, activation_checkpointing=True, router_z_loss_coef=0.001)
    assert_same_training(eager, compiled, steps=3)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_compilation_keeps_the_names_of_the_state() -> None:
    eager, compiled = pair_of_decoders(ExpertThreshold())
    assert list(compiled.state_dict()) == list(eager.state_dict())
