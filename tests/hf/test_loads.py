"""The loads that thresholds keep, against a loop over tokens with the model's own top-k."""

import pytest
import torch
from helpers.hf_models import CONTEXT, EXPERTS, make_model
from helpers.hf_tokenizers import VOCABULARY
from torch import Tensor

from lightning_moe.calibrate import calibrate
from lightning_moe.hf import TransformersLM
from lightning_moe.hf.loads import ReleasedLoads
from lightning_moe.routing import ExpertThreshold, Phase, RoutingState


def logits_of(lm: TransformersLM, ids: Tensor) -> list[Tensor]:
    with torch.no_grad():
        lm(ids)
    return [layer.record.logits for layer in lm.layers if layer.record is not None]


@pytest.mark.parametrize(("family", "numbers"), [("qwen3_moe", [1, 2, 5, 8]), ("deepseek_v3", [1, 2, 4])])
def test_loads_are_those_of_the_top_k(family: str, numbers: list[int]) -> None:
    lm = TransformersLM(make_model(family))
    ids = torch.randint(1, VOCABULARY, (9, CONTEXT), generator=torch.Generator().manual_seed(3))
    for layer, logits in zip(lm.layers, logits_of(lm, ids), strict=True):
        loads = ReleasedLoads(layer)
        for part in logits.split(4):
            loads.add(part)
        for number in numbers:
            state = RoutingState(layer.released, EXPERTS, number)
            if layer.released_bias is not None:
                state["selection_bias"].copy_(layer.released_bias)
            mask = layer.released.select(logits, state, Phase.CAUSAL).mask
            assert loads.shares(number).tolist() == pytest.approx(mask.double().mean((0, 1)).tolist(), abs=1e-12)
        halfway = (loads.shares(1) + loads.shares(2)) / 2
        assert loads.shares(1.5).tolist() == pytest.approx(halfway.tolist(), abs=1e-12)
        assert loads.shares(0.5).tolist() == pytest.approx((loads.shares(1) / 2).tolist(), abs=1e-12)
        for number in (0.3, 3.2, 6.5, 8):  # above 4, where the groups of DeepSeek end, too
            assert loads.shares(number).sum().item() == pytest.approx(number)
            assert loads.shares(number).max() <= 1 + 1e-12


def test_thresholds_give_each_expert_the_load_of_the_top_k() -> None:
    lm = TransformersLM(make_model("qwen3_moe"))
    ids = torch.randint(1, VOCABULARY, (20, CONTEXT), generator=torch.Generator().manual_seed(4))
    lm.route_by(ExpertThreshold(), 2)
    calibrate(lm, lambda: iter([ids]), keep_loads=True)
    for layer, logits in zip(lm.layers, logits_of(lm, ids), strict=True):
        own = logits.topk(2).indices.flatten().bincount(minlength=EXPERTS)
        assert layer.record is not None
        kept = layer.record.selection.mask.sum((0, 1))
        assert (own - kept).tolist() == pytest.approx(
            [1] * EXPERTS, abs=1
        )  # the k-th itself is not above the threshold
        assert own.max() > 1.2 * own.double().mean()
