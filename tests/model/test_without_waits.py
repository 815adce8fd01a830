"""The layer as a GPU computes it: room for all pairs, memory that nobody initialised, no number read by the host.

The CPU stands in: `waits.reading_waits` says that reading waits, and torch fills uninitialised memory with NaN.
"""

from collections.abc import Iterator

import pytest
import torch
from helpers.reading import numbers_read
from helpers.routing_reference import RULES_AND_PHASES, name_of
from torch import Tensor

from lightning_moe.model import Decoder, DecoderConfig, MoELayer, next_token_loss
from lightning_moe.routing import ExpertThreshold, Phase, RoutingRule, RoutingState, Selection, TokenChoice
from lightning_moe.routing.statistics import micro_batch_statistics, pool_statistics
from lightning_moe.waits import as_if_reading_waited

CONFIG = {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "vocab_size": 64, "num_experts": 4}


@pytest.fixture(autouse=True)
def uninitialised_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def decoder(rule: RoutingRule, phase: Phase = Phase.TRAIN, **options: object) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(**{**CONFIG, "max_sequence_length": 16, **options}), rule)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for layer in model.moe_layers():
        layer.train_phase = phase
    return model.train(phase is not Phase.CAUSAL)


def step(model: Decoder, ids: Tensor) -> list[Tensor]:
    """The loss, all gradients, and the routing state after a step."""
    output = model(ids)
    loss = next_token_loss(output.logits, ids).mean()
    (loss if output.aux_loss is None else loss + output.aux_loss).backward()
    layers = {str(index): layer for index, layer in enumerate(model.moe_layers())}
    states = {name: layer.state for name, layer in layers.items()}
    parts = {name: micro_batch_statistics(layer.record, layer.state) for name, layer in layers.items() if layer.record}
    with torch.no_grad():
        for name, statistics in pool_statistics(states, [parts]).items():
            states[name].update(statistics)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [loss.detach(), *gradients, *(buffer for state in states.values() for buffer in state.buffers())]


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@pytest.mark.parametrize(("rule", "phase"), RULES_AND_PHASES, ids=name_of)
def test_a_step_gives_the_bits_of_the_exact_number_of_pairs(rule: RoutingRule, phase: Phase, activation: str) -> None:
    ids = torch.randint(0, 64, (4, 16))
    expected = step(decoder(rule, phase, activation=activation), ids)
    with as_if_reading_waited():
        results = step(decoder(rule, phase, activation=activation), ids)
    for found, exact in zip(results, expected, strict=True):
        assert exact.isfinite().all()
        assert torch.equal(found, exact)


@pytest.mark.parametrize(("rule", "phase"), RULES_AND_PHASES, ids=name_of)
def test_the_host_reads_no_number_in_a_step_whose_pairs_have_a_bound(rule: RoutingRule, phase: Phase) -> None:
    model, ids = decoder(rule, phase), torch.randint(0, 64, (4, 16))
    with as_if_reading_waited():
        step(model, ids)
        with numbers_read() as found:
            step(model, ids)
    has_capacity = getattr(rule, "capacity_factor", 0) is not None
    if isinstance(rule, TokenChoice) or phase is Phase.WARMUP or (phase is Phase.TRAIN and has_capacity):
        assert found == []
    else:  # one wait per MoE layer, for the number of pairs
        assert [name for name, _ in found] == ["aten::nonzero"]  # the other layer is dense


def test_the_bound_is_kept_and_reached() -> None:
    ids = torch.randint(0, 64, (4, 16))
    for rule, most in ((TokenChoice(), 64), (ExpertThreshold(capacity_factor=0.5), 96)):
        model = decoder(rule)
        for layer in model.moe_layers():
            if "threshold" in layer.state:
                layer.state["threshold"].fill_(-torch.inf)  # every token exceeds it
        model(ids)
        for layer in model.moe_layers():
            assert layer.record is not None
            assert layer.record.selection.max_pairs == most
            assert layer.record.selection.mask.sum() == most


class Promise(TokenChoice):
    """A rule that promises fewer pairs than it chooses."""

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        return Selection(super().select(logits, state, phase).mask, max_pairs=3)


def test_a_broken_promise_gives_nan_instead_of_missing_pairs() -> None:
    layer = MoELayer(DecoderConfig(**CONFIG), Promise(), 1)
    with as_if_reading_waited():
        y, _ = layer(torch.randn(2, 8, 16))
    assert y.isnan().any()


def test_compiled_blocks_have_one_graph_for_all_numbers_of_pairs() -> None:
    torch.compiler.reset()
    eager, compiled = decoder(ExpertThreshold()), decoder(ExpertThreshold())
    graphs = []

    def count(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(module)
        return module

    for block in compiled.blocks:
        block.compile(backend=count)
    with as_if_reading_waited():
        for _ in range(3):
            ids = torch.randint(0, 64, (4, 16))
            for found, exact in zip(step(compiled, ids), step(eager, ids), strict=True):
                torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
    packing = [graph for graph in graphs if any("pack_pairs" in str(node.target) for node in graph.graph.nodes)]
    assert (len(graphs), len(packing)) == (2, 1), "one graph of the dense block, one of the other"
