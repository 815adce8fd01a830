"""Loss without an expert against a layer that is a loop over tokens; cosines against plain dot products."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_moe.analysis import ablation, similarity
from lightning_moe.analysis.ablation import Ablation
from lightning_moe.analysis.observe import Batch, observe
from lightning_moe.model import Decoder, DecoderConfig, next_token_loss
from lightning_moe.model.moe import MoELayer
from lightning_moe.report.figures import png
from lightning_moe.routing import ExpertThreshold, RoutingRule, TokenChoice

NAMES = ["layer_01", "layer_02"]
SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "max_sequence_length": 8,
    "hidden_size": 16,
    "num_layers": 3,
    "num_attention_heads": 2,
    "num_experts": 4,
}


def make(rule: RoutingRule, **sizes: Any) -> Decoder:
    torch.manual_seed(1)
    decoder = Decoder(DecoderConfig(**{**SIZES, **sizes}), rule)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder.eval()


def text(rows: int = 4, seed: int = 2) -> Batch:
    tokens = torch.randint(0, 20, (rows, 9), generator=torch.Generator().manual_seed(seed))
    labels = tokens[:, 1:].clone()
    labels[-1, 5:] = -100
    return Batch(tokens[:, :-1], labels, torch.zeros(rows, dtype=torch.int64))


@contextmanager
def slow_layer(layer: MoELayer, without: int) -> Iterator[None]:
    """Compute a layer token by token, as if an expert did not exist for those who chose it."""

    def forward(x: Tensor) -> tuple[Tensor, None]:
        logits = layer.router(x)
        chosen = layer.rule.select(logits, layer.state, layer.phase).mask
        y = torch.zeros_like(x)
        for b in range(x.shape[0]):
            for s in range(x.shape[1]):
                mine = [e for e in range(4) if chosen[b, s, e] and e != without]
                gates = {e: 1 / (1 + math.exp(-float(logits[b, s, e]))) for e in mine}
                total = sum(gates.values()) if layer.normalize_gates else 1.0
                for e, gate in gates.items():
                    one = torch.zeros(1, 4, dtype=torch.bool)
                    one[0, e] = True
                    y[b, s] += gate / total * layer.experts(x[b, s][None], one, torch.ones(1, 4))[0]
                if layer.shared_expert is not None:
                    y[b, s] += layer.shared_expert(x[b, s][None])[0]
        return y, None

    layer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del layer.forward


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rule", [ExpertThreshold(), TokenChoice()], ids=lambda rule: type(rule).__name__)
def test_the_loss_without_each_expert(rule: RoutingRule, normalize: bool) -> None:
    decoder = make(rule, num_experts_per_token=2, normalize_gates=normalize)
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    batch = text()
    seen = observe(decoder, batch)
    result = Ablation(decoder, 1000)
    result.update(batch, seen)
    assert all(layer.rule is rule for layer in decoder.moe_layers())
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
    assert result.num_tokens == 29
    valid = batch.labels != -100
    mean, error = result.mean()
    for number, layer in enumerate(decoder.moe_layers()):
        for expert in range(4):
            with torch.no_grad(), slow_layer(layer, expert):
                loss = next_token_loss(decoder(batch.input_ids).logits, batch.labels)
            changes = (loss - seen.loss)[valid].double().numpy()
            took = seen.experts[:, :, number, expert][valid].numpy()
            assert float(mean[number, expert]) == pytest.approx(changes.mean(), abs=1e-5)
            assert float(error[number, expert]) == pytest.approx(changes.std() / math.sqrt(29), abs=1e-5)
            assert int(result.routed[number, expert]) == took.sum()
            if took.any():
                assert float(result.per_use()[number, expert]) == pytest.approx(changes.sum() / took.sum(), abs=1e-5)
                of_routed = float(result.delta_routed[number, expert] / result.routed[number, expert])
                assert of_routed == pytest.approx(changes[took].mean(), abs=1e-5)


def test_experts_that_matter_and_one_that_does_nothing() -> None:
    """Training may change the experts of the last layer only, so what it learns is in them."""
    decoder, batch = make(TokenChoice(), num_experts_per_token=2), text()
    *_, last = decoder.moe_layers()
    with torch.no_grad():
        last.experts.down[2] = 0
    last.experts.down.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([2]), 0.0))
    optimizer = torch.optim.Adam(last.experts.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        decoder(batch.input_ids, labels=batch.labels).loss.backward()
        optimizer.step()
    result = Ablation(decoder, 1000)
    result.update(batch, observe(decoder, batch))
    mean, error = result.mean()
    assert abs(float(mean[1, 2])) < 1e-6
    assert all(float(mean[1, expert]) > max(0.05, 2 * float(error[1, expert])) for expert in (0, 3))  # 1 took one token
    found = ablation.section({"a": result}, NAMES)
    assert found.summary[1]["most important expert"] == int(mean[1].argmax())
    assert found.summary[1]["experts with Δ below 2 standard errors"] == 2
    assert len(png(found.figures["ablation"])) > 1000


def test_only_as_many_windows_as_asked_for_are_used() -> None:
    decoder = make(TokenChoice())
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    decoder.register_forward_hook(count)
    whole = text(2)
    for asked, tokens in ((0, 0), (1, 8), (8, 8), (9, 13), (14, 21), (10**6, 26)):
        result = Ablation(decoder, asked)
        observed = [(batch, observe(decoder, batch)) for batch in (whole, whole)]
        passes = 0
        for batch, seen in observed:
            result.update(batch, seen)
        assert result.num_tokens == tokens
        assert passes <= 8 * min(2, tokens)
    unused = observed[0][1].experts.clone()
    unused[..., 3] = False
    result, passes = Ablation(decoder, 1000), 0
    result.update(whole, replace(observed[0][1], experts=unused))
    assert passes == int(unused[whole.labels != -100].any(0).sum()) <= 6  # an expert without tokens needs no pass
    off = ablation.section({"a": Ablation(decoder, 0)}, NAMES)
    assert off.missing == ("Each of the 8 experts costs a pass over the tokens used: give --ablation_tokens 2048.",)
    assert not off.figures


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_cosines_of_experts_and_rows(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make(ExpertThreshold(), activation=activation)
    monkeypatch.setattr(similarity, "CHUNK_BYTES", 4 * 4 * 37)  # several pieces, the last one shorter
    layers = list(decoder.moe_layers())
    with torch.no_grad():
        for stack in layers[1].experts.parameters():
            stack[3] = 2 * stack[0]  # a copy, up to its length
        layers[0].router.weight[1] = -layers[0].router.weight[2]
    found = similarity.similarity(decoder)
    for number, layer in enumerate(layers):
        vectors = {
            "weights": [
                np.concatenate([s[e].detach().double().numpy().ravel() for s in layer.experts.parameters()])
                for e in range(4)
            ],
            "router": list(layer.router.weight.detach().double().numpy()),
        }
        for kind, mine in vectors.items():
            cosines = found[kind][number]
            assert cosines is not None
            assert cosines.size == len(mine[0])
            for i in range(4):
                for j in range(4):
                    expected = mine[i] @ mine[j] / np.linalg.norm(mine[i]) / np.linalg.norm(mine[j])
                    assert float(cosines.values[i, j]) == pytest.approx(expected, abs=1e-5)
    part = similarity.section({"a": found}, NAMES)
    assert part.summary[1]["weights, most alike"] == "0 – 3"
    assert part.summary[1]["weights, highest"] == pytest.approx(1.0)
    assert part.tables["similarity"][-1]["cosine"] < 1
    assert min(row["cosine"] for row in part.tables["similarity"]) == pytest.approx(-1.0)
    assert len(png(part.figures["similarity"])) > 1000


def test_weights_that_cannot_be_read_and_experts_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make(ExpertThreshold())
    with torch.no_grad():
        for stack in next(decoder.moe_layers()).experts.parameters():
            stack[1] = 0
    cosines = similarity.similarity(decoder)["weights"][0]
    assert cosines is not None
    assert [(i, j) for _, i, j in sorted(cosines.pairs, key=lambda pair: pair[1:])] == [(0, 2), (0, 3), (2, 3)]
    monkeypatch.setattr(MoELayer, "expert_weights", lambda self, expert: ())
    part = similarity.section({"a": similarity.similarity(decoder)}, NAMES)
    assert part.missing == ["a: the weights of the experts cannot be read."]
    assert len(png(part.figures["similarity"])) > 1000
    monkeypatch.setattr(MoELayer, "router_weights", lambda self: None)
    part = similarity.section({"a": similarity.similarity(decoder)}, NAMES)
    assert len(part.missing) == 2
    assert not part.figures
