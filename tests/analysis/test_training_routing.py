"""The same weights on the same text, routed as in training and causally."""

import pytest
import torch
from test_checkpoints_side_by_side import make, text
from test_routing_pools import loss_with_experts_choosing, whole

from lightning_moe.analysis.observe import Batch, observe
from lightning_moe.analysis.training_record import training_phase
from lightning_moe.analysis.training_routing import TrainingRouting
from lightning_moe.model import Decoder, next_token_loss
from lightning_moe.routing import ExpertChoice, ExpertThreshold, Phase, RoutingRule, TokenChoice


def causal_loss(decoder: Decoder, batch: Batch) -> float:
    with torch.no_grad():
        return float(next_token_loss(decoder(batch.input_ids).logits, batch.labels).mean())


def measured(decoder: Decoder, batches: list[Batch], phase: Phase = Phase.TRAIN) -> TrainingRouting:
    result = TrainingRouting(decoder, phase, batch_size=4)
    for batch in batches:
        result.update(batch, observe(decoder, batch))
    return result


@pytest.mark.parametrize(
    ("rule", "phase"),
    [(ExpertChoice(), Phase.TRAIN), (ExpertThreshold(), Phase.WARMUP)],
    ids=["expert choice", "the warm-up of expert threshold"],
)
def test_experts_choose_among_full_batches(rule: RoutingRule, phase: Phase) -> None:
    decoder, batch = make(rule), whole()
    result = measured(decoder, [batch, text(), whole(2)], phase)  # padded, and not full: neither counts
    assert result.num_tokens == 32
    assert result.causal_loss == pytest.approx(causal_loss(decoder, batch), rel=1e-5)
    assert result.loss == pytest.approx(loss_with_experts_choosing(decoder, batch, 4), rel=1e-5)
    assert result.loss != pytest.approx(result.causal_loss, rel=1e-4)
    assert not result.missing


@pytest.mark.parametrize("rule", [ExpertThreshold(capacity_factor=None), TokenChoice()], ids=["thresholds", "tokens"])
def test_rules_that_train_as_they_infer_have_no_gap(rule: RoutingRule) -> None:
    result = measured(make(rule), [whole(), whole()])
    assert result.loss == result.causal_loss


def test_what_cannot_be_measured_is_said() -> None:
    batch = whole()
    odd = measured(make(ExpertChoice(pool=3)), [batch, batch])
    assert odd.loss is None
    assert "pools of 3 sequences, but a micro-batch has 4" in odd.missing
    assert odd.causal_loss is not None
    little = measured(make(ExpertChoice()), [text()])
    assert (little.loss, little.causal_loss) == (None, None)
    assert "no full batch of 4 windows" in little.missing
    decoder = make(None)
    dense = measured(decoder, [batch])
    assert (dense.loss, dense.missing) == (None, "")
    assert dense.causal_loss == pytest.approx(causal_loss(decoder, batch), rel=1e-5)


def test_the_phase_of_a_checkpoint() -> None:
    def phase(callbacks: dict[str, object]) -> Phase:
        return training_phase({"callbacks": callbacks})

    assert phase({"ThresholdWarmup": {"switched_at_step": None}}) is Phase.WARMUP
    assert phase({"ThresholdWarmup": {"switched_at_step": 0}}) is Phase.TRAIN
    assert phase({}) is training_phase({}) is Phase.TRAIN
