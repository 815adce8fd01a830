"""One pass over text with several models: losses, the dial, FLOPs, training routing; nothing in the models changes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_moe.analysis.collect import Subject, collect
from lightning_moe.analysis.compute import ComputeSweep
from lightning_moe.analysis.observe import Batch, observe
from lightning_moe.analysis.run import Origin, check_comparable, run_names
from lightning_moe.errors import UserError
from lightning_moe.model import Decoder, DecoderConfig, inference_num_experts_per_token, next_token_loss
from lightning_moe.routing import ExpertChoice, ExpertThreshold, Phase, RoutingRule, TokenChoice

SIZES = {
    "vocab_size": 20,
    "max_sequence_length": 8,
    "hidden_size": 16,
    "num_layers": 3,
    "num_attention_heads": 2,
    "num_experts": 4,
}


def make(rule: RoutingRule | None, **sizes: Any) -> Decoder:
    decoder = Decoder(DecoderConfig(**{**SIZES, **sizes}), rule)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder.eval()


def text(rows: int = 4) -> Batch:
    tokens = torch.randint(0, 20, (rows, 9))
    labels = tokens[:, 1:].clone()
    labels[-1, 5:] = -100
    return Batch(tokens[:, :-1], labels, torch.arange(rows) % 2)


def test_losses_pairs_and_states() -> None:
    batches = [text(), text(), text(2)]
    subjects = [
        Subject("et", make(ExpertThreshold())),
        Subject("ec", make(ExpertChoice(pool=4))),
        Subject("d", make(None)),
    ]
    before = [{name: value.clone() for name, value in s.decoder.state_dict().items()} for s in subjects]
    token_bytes = torch.arange(20)
    seen_tokens: list[int] = []
    collected = collect(subjects, iter(batches), 2, 8, token_bytes, 0, [0.5, 2.0], progress=seen_tokens.append)
    assert seen_tokens == [29, 29, 13]
    assert list(collected.pairs) == [("et", "ec")]
    for subject, state in zip(subjects, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in subject.decoder.state_dict().items())
        assert not subject.decoder.training
        nll, tokens, size = [0.0, 0.0], [0, 0], [0, 0]
        for batch in batches:
            with torch.no_grad():
                loss = next_token_loss(subject.decoder(batch.input_ids).logits, batch.labels)
            for row, domain in enumerate(batch.domains.tolist()):
                kept = batch.labels[row] != -100
                nll[domain] += float(loss[row][kept].sum())
                tokens[domain] += int(kept.sum())
                size[domain] += int(token_bytes[batch.labels[row][kept]].sum())
        losses = collected.measurements[subject.label].losses
        assert losses.mean == pytest.approx(sum(nll) / sum(tokens), rel=1e-5)
        assert losses.bits_per_byte(1) == pytest.approx(nll[1] / math.log(2) / size[1], rel=1e-5)
        assert losses.bits_per_byte() == pytest.approx(sum(nll) / math.log(2) / sum(size), rel=1e-5)
        assert collected.num_tokens == tokens


def test_an_observation_is_the_forward_pass_in_its_phase() -> None:
    decoder, batch = make(ExpertThreshold(capacity_factor=0.0)), text()
    causal, training = observe(decoder, batch), observe(decoder, batch, Phase.TRAIN)
    layer = next(decoder.moe_layers())
    assert training.experts[:, :, 0].sum((0, 1)).tolist() == [8] * 4  # the capacity: 32 tokens, a quarter each
    assert torch.equal(causal.experts[:, :, 0], causal.logits[:, :, 0] > layer.state["threshold"])
    assert torch.equal(causal.valid, batch.labels != -100)
    assert causal.logits.shape == (4, 8, 2, 4)


@pytest.mark.parametrize("normalize", [True, False])
def test_an_observation_has_gates_and_predictions(normalize: bool) -> None:
    decoder, batch = make(TokenChoice(), num_experts_per_token=2, normalize_gates=normalize), text()
    seen = observe(decoder, batch, with_predictions=True)
    assert not decoder.predicts
    assert observe(decoder, batch).predicted is None
    with torch.no_grad():
        best = decoder(batch.input_ids).logits.argmax(-1)
    assert torch.equal(seen.predicted, torch.where(seen.valid, best, -100))
    assert torch.equal(seen.next_tokens, batch.labels)
    assert torch.equal(seen.gates > 0, seen.experts)
    for row in range(4):
        for position in range(8):
            for layer in range(2):
                chosen = sorted(seen.logits[row, position, layer].sigmoid().tolist())[-2:]
                scale = sum(chosen) if normalize else 1.0
                found = sorted(seen.gates[row, position, layer].tolist())
                assert found == pytest.approx([0.0, 0.0, *(gate / scale for gate in chosen)], rel=1e-5)


@pytest.mark.parametrize("rule", [ExpertThreshold(), TokenChoice()], ids=lambda rule: type(rule).__name__)
def test_the_compute_sweep_is_what_single_passes_give(rule: RoutingRule) -> None:
    decoder, batches = make(rule), [text(), text()]
    sweep = ComputeSweep(decoder, [2.0, 0.5, 100.0])
    for batch in batches:
        sweep.update(batch, observe(decoder, batch))
    expected = [0.5, 1.0, 2.0] if isinstance(rule, ExpertThreshold) else [1.0, 2.0]
    points = sweep.points()
    assert [point["inference_num_experts_per_token"] for point in points] == expected
    assert set(sweep.refused) == {0.5, 1.0, 2.0, 100.0} - set(expected)
    per_expert = 2 * 2 * 16 * 32  # two matrices of hidden size 16 × 32, a multiplication and an addition each
    for point in points:
        loss, fanout, tokens = 0.0, 0, 0
        for batch in batches:
            with inference_num_experts_per_token(decoder, point["inference_num_experts_per_token"]):
                seen = observe(decoder, batch)
            loss += float(seen.loss.sum())
            fanout += int(seen.experts[seen.valid].sum())
            tokens += int(seen.valid.sum())
        assert point["loss"] == pytest.approx(loss / tokens, rel=1e-5)
        assert point["fanout"] == pytest.approx(fanout / tokens)
        assert point["asked_fanout"] == 2 * point["inference_num_experts_per_token"]
        # everything but routed experts: attention, dense layer and shared experts, routers, head, scores and values
        fixed = 2 * (3 * 4 * 16 * 16 + 2 * 16 * 64 + 2 * 2 * 16 * 32 + 2 * 16 * 4 + 16 * 20) + 2 * 3 * 16 * 8
        assert point["flops_per_token"] == pytest.approx(fixed + point["fanout"] * per_expert)


def test_the_compute_sweep_keeps_the_proportions_between_layers() -> None:
    decoder = make(ExpertThreshold(), num_experts_per_token=[0.5, 1])
    sweep, batch = ComputeSweep(decoder), text()
    sweep.update(batch, observe(decoder, batch))
    found = {point["inference_num_experts_per_token"]: point["fanout"] for point in sweep.points()}
    assert list(found) == [0.75 * factor for factor in (0.25, 0.5, 1, 2)]  # four times: beyond the sketch of layer 2
    assert list(sweep.refused) == [3.0]
    with inference_num_experts_per_token(decoder, [1, 2]):
        seen = observe(decoder, batch)
    assert found[1.5] == pytest.approx(float(seen.experts[seen.valid].sum()) / int(seen.valid.sum()))


def test_other_experts_cannot_be_compared() -> None:
    subjects = [Subject("a", make(ExpertThreshold())), Subject("dense", make(None))]
    check_comparable(subjects)
    with pytest.raises(UserError, match=r"a has 2 MoE layers of 4 experts, b 2 of 8: .*by itself"):
        check_comparable([*subjects, Subject("b", make(ExpertThreshold(), num_experts=8))])
    with pytest.raises(UserError, match="b 1 of 4"):
        check_comparable([*subjects, Subject("b", make(ExpertThreshold(), num_layers=2))])


def test_no_text_is_refused() -> None:
    with pytest.raises(UserError, match="no text to analyse"):
        collect([Subject("a", make(None))], iter([]), 1, 8, torch.ones(20, dtype=torch.int64), 0)


def test_runs_of_one_name_are_told_apart() -> None:
    folders = {"a": "x/run", "b": "x/run", "c": "y/run", "d": "y/other", "e": None}
    origins = {
        label: Origin(Path("f.ckpt"), "dense", 1, None if folder is None else Path(folder), {})
        for label, folder in folders.items()
    }
    names = run_names(origins)
    assert names["a"] == names["b"] == str(Path("x/run").resolve())
    assert names["c"] == str(Path("y/run").resolve())
    assert names["d"] == "other"
    assert "e" not in names
