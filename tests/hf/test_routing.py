"""A released model under any choice of experts, against a slow computation of its layers expert by expert."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moe.errors import UserError
from lightning_moe.hf import TransformersLM
from lightning_moe.hf.gating import Gating
from lightning_moe.model import generate, inference_num_experts_per_token, replay
from lightning_moe.routing import ExpertChoice, ExpertThreshold, Phase
from tests.helpers.hf_models import EXPERTS, FAMILIES, make_model
from tests.hf.test_structure import ids


def one_expert(layer: nn.Module, expert: int, x: Tensor) -> Tensor:
    """The output of one expert for rows x, from the family's own code: all rows to this expert, with weight 1."""
    index = torch.full((len(x), 1), expert)
    return layer.experts.forward(x, index, torch.ones(len(x), 1, dtype=x.dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_choice_is_the_sum_over_the_chosen_experts(family: str) -> None:
    lm = TransformersLM(make_model(family))
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for name, layer in lm.named_layers():  # before the layer's own hooks change what the experts get
        layer.experts.register_forward_pre_hook(
            lambda module, args, name=name: inputs.__setitem__(name, args[0]), prepend=True
        )
        layer.experts.register_forward_hook(lambda module, args, out, name=name: outputs.__setitem__(name, out))
    generator = torch.Generator().manual_seed(3)
    masks = [torch.rand(3, 40, EXPERTS, generator=generator) < 0.3 for _ in lm.layers]  # from 0 to many experts
    with torch.no_grad(), replay(lm, masks):
        lm(ids())
        for (name, layer), mask in zip(lm.named_layers(), masks, strict=True):
            assert layer.record is not None
            x, expected = inputs[name], torch.zeros_like(outputs[name])
            gates = layer.gates(layer.record.logits, mask).flatten(0, 1)
            for token, chosen in enumerate(mask.flatten(0, 1).tolist()):
                for expert in range(EXPERTS):
                    if chosen[expert]:
                        expected[token] += gates[token, expert] * one_expert(layer, expert, x[token : token + 1])[0]
            torch.testing.assert_close(outputs[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h_latent"])
def test_no_expert_at_all_leaves_what_is_shared(family: str) -> None:
    lm = TransformersLM(make_model(family))
    none = [torch.zeros(2, 5, EXPERTS, dtype=torch.bool) for _ in lm.layers]
    outputs: list[Tensor] = []
    lm.layers[0].experts.register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.no_grad(), replay(lm, none):
        logits = lm(ids(shape=(2, 5))).logits
    assert not outputs[0].any()
    assert bool(logits.isfinite().all())


def test_gates_of_every_kind_against_slow_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(50, 6, generator=generator) < 0.5
    mask[0] = False
    for score in ("softmax", "sigmoid"):
        for normalize in (False, True):
            found = Gating(score, normalize, 1.5).gates(logits, mask)
            for token in range(50):
                each = [
                    float(torch.exp(r)) if score == "softmax" else float(1 / (1 + torch.exp(-r))) for r in logits[token]
                ]
                if score == "softmax" and not normalize:
                    each = [value / sum(each) for value in each]
                total = sum(value for value, chosen in zip(each, mask[token], strict=True) if chosen)
                for expert in range(6):
                    if mask[token, expert]:
                        expected = 1.5 * each[expert] / (total if normalize else 1)
                        assert float(found[token, expert]) == pytest.approx(expected, rel=1e-9)
            assert bool(found.isfinite().all())


def test_the_sparse_mixer_against_its_definition() -> None:
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.zeros(40, 6, dtype=torch.bool).scatter_(1, logits.topk(3, dim=1).indices, True)
    found = Gating("sparsemixer", jitter=0.3).gates(logits, mask)
    for token, row in enumerate(logits.tolist()):
        left = list(range(6))
        for _ in range(3):
            best = max(left, key=row.__getitem__)
            close = [i for i in left if (row[best] - row[i]) / max(abs(row[i]), row[best]) <= 0.6]
            expected = 1 / sum(float(torch.tensor(row[i] - row[best]).exp()) for i in close)
            assert float(found[token, best]) == pytest.approx(expected, rel=1e-6)
            left.remove(best)


def test_thresholds_choose_what_lies_above_them_whatever_the_batch() -> None:
    lm = TransformersLM(make_model("deepseek_v3"))
    lm.route_by(ExpertThreshold(), 1.5)
    generator = torch.Generator().manual_seed(0)
    for layer in lm.layers:
        layer.state["threshold"].copy_(torch.randn(EXPERTS, generator=generator))
    text = ids()
    with torch.no_grad():
        together = lm(text).logits
        records = [layer.record for layer in lm.layers]
        for layer, record in zip(lm.layers, records, strict=True):
            assert record is not None
            assert torch.equal(record.selection.mask, record.logits > layer.state["threshold"])
        alone = torch.cat([lm(row[None, :25]).logits for row in text])
    torch.testing.assert_close(together[:, :25], alone, rtol=1e-4, atol=1e-4)


def test_softmax_routers_compare_log_probabilities() -> None:
    lm = TransformersLM(make_model("qwen3_moe"))
    with torch.no_grad():
        lm(ids())
        first = lm.layers[0]
        assert first.record is not None
        logits = first.record.logits
        lm.route_by(ExpertThreshold(), 2)
        lm(ids())
    assert first.record is not None
    torch.testing.assert_close(first.record.logits, F.log_softmax(logits, -1))


def test_the_dial_takes_more_or_fewer_experts_and_refuses_what_does_not_exist() -> None:
    lm = TransformersLM(make_model("mixtral"))
    for number in (1, 3):
        with torch.no_grad(), inference_num_experts_per_token(lm, number):
            lm(ids())
            record = lm.layers[0].record
            assert record is not None
            assert bool((record.selection.mask.sum(-1) == number).all())
            best = record.logits.topk(number, dim=-1).indices
            assert bool(record.selection.mask.gather(-1, best).all())
    for number in (1.5, 9):
        with (
            pytest.raises(UserError, match=f"inference_num_experts_per_token={number:g}"),
            inference_num_experts_per_token(lm, number),
        ):
            pass
    limited = TransformersLM(make_model("deepseek_v3"))  # one of two groups of four
    with pytest.raises(UserError, match="at most 4"), inference_num_experts_per_token(limited, 5):
        pass


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2_groups", "gpt_oss", "lfm2_moe"])
def test_decoding_with_the_cache_is_the_full_pass(family: str) -> None:
    lm = TransformersLM(make_model(family))
    prompt = ids(shape=(2, 9))
    new = generate(lm, prompt, 8, temperature=0)
    with torch.no_grad():
        full = lm(new).logits
    assert torch.equal(new[:, 9:], full[:, 8:-1].argmax(-1))


def test_losses_are_those_of_the_logits() -> None:
    for family in ("granitemoe", "phimoe"):  # a divisor of the logits; a head with a bias, which has no chunks
        lm = TransformersLM(make_model(family))
        labels = ids(seed=1)
        labels[0, 3] = -100
        with torch.no_grad():
            found = lm(ids(), labels=labels)
            logits = lm(ids()).logits.double()
        expected = -logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0] * (labels != -100)
        torch.testing.assert_close(found.token_loss.double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.loss.double(), expected.mean(), rtol=1e-4, atol=1e-4)


def test_a_copy_has_a_routing_of_its_own() -> None:
    lm = TransformersLM(make_model("olmoe"))
    other = copy.deepcopy(lm)
    other.route_by(ExpertThreshold(), 2)
    for layer in other.layers:
        layer.state["threshold"].fill_(torch.inf)
    with torch.no_grad():
        other(ids())
        lm(ids())
    mine, theirs = lm.layers[0].record, other.layers[0].record
    assert mine is not None
    assert theirs is not None
    assert mine.selection.mask.any()
    assert not theirs.selection.mask.any()


def test_experts_may_choose_tokens_and_gradients_reach_the_router() -> None:
    lm = TransformersLM(make_model("qwen3_moe"))
    lm.route_by(ExpertChoice(), 2)
    lm.train()
    lm.layers[0].train_phase = lm.layers[1].train_phase = Phase.TRAIN
    lm(ids(), labels=ids(seed=1)).loss.backward()
    for layer in lm.layers:
        assert layer.record is not None
        assert layer.record.selection.mask.sum((0, 1)).tolist() == [30] * EXPERTS  # 120 tokens · 2 / 8
        gradient = next(layer.router.parameters()).grad
        assert gradient is not None
        assert bool(gradient.any())
    assert not lm.model.training
