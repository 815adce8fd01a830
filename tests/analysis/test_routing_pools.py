"""Loss against the routing pool: at inference against choosing by hand, in training against the configuration."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoints_side_by_side import make, text

from lightning_moe.analysis.observe import Batch, observe
from lightning_moe.analysis.pools import PoolSweep, Trained, section, training_pool
from lightning_moe.model import Decoder, next_token_loss
from lightning_moe.routing import ExpertChoice, ExpertThreshold, RoutingRule, TokenChoice


def whole(rows: int = 4) -> Batch:
    """Without padding."""
    batch = text(rows)
    return Batch(batch.input_ids, batch.labels.clamp_min(0), batch.domains)


def loss_with_experts_choosing(decoder: Decoder, batch: Batch, pool: int) -> float:
    """Each layer's threshold is set, pool by pool, to what lets exactly k tokens through."""
    total = 0.0
    for ids, labels in zip(batch.input_ids.split(pool), batch.labels.split(pool), strict=True):
        thresholds = [layer.state["threshold"].clone() for layer in decoder.moe_layers()]
        for index in range(len(thresholds)):  # from the bottom: a layer sees what those below it chose
            with torch.no_grad():
                decoder(ids)
            layer = list(decoder.moe_layers())[index]
            logits = layer.record.logits.flatten(0, 1).sort(0, descending=True).values
            k = len(logits) // 4
            layer.state["threshold"].copy_((logits[k - 1] + logits[k]) / 2)
        with torch.no_grad():
            total += float(next_token_loss(decoder(ids).logits, labels).sum())
        for layer, threshold in zip(decoder.moe_layers(), thresholds, strict=True):
            layer.state["threshold"].copy_(threshold)
    return total / batch.labels.numel()


@pytest.mark.parametrize("rule", [ExpertThreshold(), ExpertChoice(pool=4)], ids=lambda rule: type(rule).__name__)
def test_pools_at_inference_are_experts_choosing(rule: RoutingRule) -> None:
    decoder, batch = make(rule), whole()
    sweep = PoolSweep(decoder, [4, 1, 2], batch_size=4)
    for other in (batch, text(), whole(2)):  # padded, and not full: neither counts
        sweep.update(other, observe(decoder, other))
    assert sweep.num_tokens == 32
    assert list(sweep.losses()) == [1, 2, 4]
    for size, loss in sweep.losses().items():
        assert loss == pytest.approx(loss_with_experts_choosing(decoder, batch, size), rel=1e-5)
    with torch.no_grad():
        causal = next_token_loss(decoder(batch.input_ids).logits, batch.labels).mean()
    assert sweep.causal_loss == pytest.approx(float(causal), rel=1e-5)
    assert all(layer.rule is rule for layer in decoder.moe_layers())
    assert not decoder.training


def config(devices: Any = 2) -> dict[str, Any]:
    trainer = {"devices": devices, "num_nodes": 2, "accumulate_grad_batches": 4}
    return {"data": {"global_batch_size": 64}, "trainer": trainer}


@pytest.mark.parametrize(
    ("rule", "config", "tokens"),
    [
        (ExpertChoice(pool="sequence"), None, 10),
        (ExpertChoice(pool=3), None, 30),
        (ExpertChoice(pool="micro_batch"), config(), 640 / 4 / 4),  # two devices on each of two machines
        (ExpertChoice(pool="micro_batch"), config([0]), 640 / 4 / 2),
        (ExpertChoice(pool="micro_batch"), config("auto"), None),
        (ExpertChoice(pool="micro_batch"), None, None),
        (ExpertChoice(pool="global"), config("auto"), 640 / 4),
        (ExpertThreshold(ema_decay=0.9), config("auto"), 6400),
        (ExpertThreshold(ema_half_life_tokens=640), config(), 1280),  # β = 1/2
        (ExpertThreshold(), None, None),
        (TokenChoice(), config(), None),
        (None, config(), None),
    ],
)
def test_pools_in_training(rule: RoutingRule | None, config: dict[str, Any] | None, tokens: float | None) -> None:
    assert training_pool(rule, 10, config) == (None if tokens is None else pytest.approx(tokens))


def swept() -> PoolSweep:
    decoder, batch = make(ExpertThreshold()), whole()
    sweep = PoolSweep(decoder, [1, 2], 4)
    sweep.update(batch, observe(decoder, batch))
    return sweep


def test_what_is_drawn_and_what_is_missing(tmp_path: Path) -> None:
    choice, threshold = ExpertChoice(), ExpertThreshold()
    trained = {
        "a": Trained(choice, 8.0, 2.0, 1.9),
        "b": Trained(threshold, 640.0, 1.8, None),
        "c": Trained(TokenChoice(), None, 1.7, 1.7),
        "d": Trained(choice, None, 1.9, 1.9),
    }
    found = section({"a": swept()}, trained, 8)
    assert [row["pool_tokens"] for row in found.tables["pools_in_training"]] == [8, 640, None, None]
    assert [row["pool_tokens"] for row in found.tables["pools_at_inference"]] == [8, 16]
    [left, right] = found.figures["pools"].axes
    assert left.get_xlabel() == "pool in training / tokens"
    assert right.get_xlabel() == "pool at inference / tokens"
    assert [note.partition(":")[0] for note in found.missing] == ["d"]

    alone = section({"a": swept()}, {"a": trained["a"]}, 8)
    assert list(alone.tables) == ["pools_at_inference"]
    assert "several checkpoints" in alone.missing[0]
    [axis] = alone.figures["pools"].axes
    assert axis.get_xlabel() == "pool at inference / tokens"

    short = PoolSweep(make(ExpertThreshold()), [1, 2], 4)
    nothing = section({"a": short}, {"a": trained["a"]}, 8)
    assert not nothing.figures
    assert "no full batch of 4 windows" in nothing.missing[1]
