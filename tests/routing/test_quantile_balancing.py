"""Quantile Balancing against loops and sorting in float64, and its place in the family of quantile rules."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.gloo_pair import GlooPair
from helpers.routing_reference import ReferenceMoE
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.model import DecoderConfig, MoELayer
from lightning_moe.routing import (
    ExpertThreshold,
    Phase,
    QuantileBalancing,
    RoutingRule,
    RoutingState,
    rule_from_config,
    target_count,
)
from lightning_moe.routing.base import RoutingRecord
from lightning_moe.routing.statistics import micro_batch_statistics, pool_statistics

CONF = Path(__file__).parents[2] / "conf" / "routing"


def make_layer(rule: RoutingRule, num_experts: int, num_experts_per_token: float) -> MoELayer:
    config = DecoderConfig(hidden_size=4, num_attention_heads=1, num_experts=num_experts, expert_hidden_size=4)
    layer = MoELayer(config, rule, num_experts_per_token)
    layer.router.reset_parameters()
    return layer


def update_by(layer: MoELayer, micro_batches: list[Tensor]) -> None:
    """One optimizer step's update from the logits [B, S, E] of its micro-batches, as the callback makes it."""
    observations = []
    for logits in micro_batches:
        layer.record = RoutingRecord(logits, layer.rule.select(logits, layer.state, Phase.TRAIN))
        observations.append({"layer": micro_batch_statistics(layer.record, layer.state)})
    layer.rule.update(layer.state, pool_statistics({"layer": layer.state}, observations)["layer"])


def reference_bias(logits: np.ndarray, bias: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(b before re-centring, α) from logits [N, n] in float64, one token and one expert at a time."""
    num_tokens, n = logits.shape
    s = 1 / (1 + np.exp(-logits.astype(np.float64)))
    alpha = np.array([sorted(s[i] + bias, reverse=True)[min(k + 1, n) - 1] for i in range(num_tokens)])
    q = min(max(int(num_tokens * k / n + 0.5), 1), num_tokens)
    new = [-sorted(s[:, j] - alpha, reverse=True)[min(q + 1, num_tokens) - 1] for j in range(n)]
    return np.array(new), alpha


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, int, Tensor]:
    """(logits fp32 [N, n], k ≤ n, current bias [n]); on a coarse grid there are many ties."""
    n = draw(st.integers(1, 6))
    k, num_tokens = draw(st.integers(1, n)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(num_tokens, n, generator=generator) * draw(st.sampled_from([0.1, 1.0, 5.0]))
    if draw(st.booleans()):
        logits = logits.round()
    return logits, k, torch.randn(n, generator=generator) * draw(st.sampled_from([0.0, 0.3]))


@given(batches())
def test_bias_is_minus_the_next_largest_margin_re_centred(batch: tuple[Tensor, int, Tensor]) -> None:
    logits, k, bias = batch
    layer = make_layer(QuantileBalancing(), logits.shape[1], k)
    layer.state["selection_bias"].copy_(bias)
    expected, _ = reference_bias(logits.numpy(), bias.double().numpy(), k)
    update_by(layer, [part.unsqueeze(0) for part in logits.split(max(1, len(logits) // 2))])
    np.testing.assert_allclose(layer.state["selection_bias"].numpy(), expected - expected.mean(), atol=1e-6)


@given(batches())
def test_selection_is_the_top_k_of_sigmoid_plus_bias(batch: tuple[Tensor, int, Tensor]) -> None:
    logits, k, bias = batch
    state = RoutingState(QuantileBalancing(), logits.shape[1], k)
    state["selection_bias"].copy_(bias)
    mask = state.rule.select(logits.unsqueeze(0), state, Phase.CAUSAL).mask[0]
    scores = (logits.sigmoid() + bias).tolist()
    for token, row in enumerate(scores):
        best = sorted(range(len(row)), key=lambda j: (-row[j], j))[:k]
        assert mask[token].nonzero().flatten().tolist() == sorted(best)


def test_with_the_other_scores_held_the_new_bias_gives_every_expert_its_share() -> None:
    """Up to ties: of the tokens whose first expert in waiting is j, all have the margin −b_j."""
    logits = torch.randn(1, 480, 8) + torch.linspace(-2, 2, 8)
    bias, alpha = reference_bias(logits[0].numpy(), np.zeros(8), 2)
    layer = make_layer(QuantileBalancing(), 8, 2)
    update_by(layer, [logits])
    np.testing.assert_allclose(layer.state["selection_bias"], bias - bias.mean(), atol=1e-6)
    margins = logits[0].double().sigmoid().numpy() - alpha[:, None]
    q = 480 * 2 // 8
    assert ((margins + bias > 1e-12).sum(0) <= q).all()
    assert ((margins + bias > -1e-12).sum(0) > q).all()
    untied = np.abs(bias) > 1e-12  # b was 0
    assert untied.sum() >= 6
    assert ((margins + bias > 1e-12).sum(0)[untied] == q).all()


def test_repeated_updates_balance_a_skewed_router() -> None:
    """Logits that send over 5 times the mean load to one expert: within 5% after ten updates on the same batch."""
    logits = torch.randn(1, 4096, 16) + torch.linspace(-2, 2, 16)
    layer = make_layer(QuantileBalancing(), 16, 1)
    worst = []
    for _ in range(11):
        load = layer.rule.select(logits, layer.state, Phase.CAUSAL).mask.sum((0, 1))
        worst.append((load.max() / load.double().mean()).item())
        update_by(layer, [logits])
    assert worst[0] > 5
    assert worst[-1] < 1.05


def test_smoothed_bias_is_the_bias_corrected_average_of_the_targets() -> None:
    layer = make_layer(QuantileBalancing(ema_decay=0.75), 5, 2)
    targets = []
    for _ in range(4):
        logits = torch.randn(1, 60, 5)
        target, _ = reference_bias(logits[0].numpy(), layer.state["selection_bias"].double().numpy(), 2)
        targets.append(target - target.mean())
        update_by(layer, [logits])
    weights = np.array([0.25 * 0.75**age for age in (3, 2, 1, 0)])
    expected = (weights[:, None] * np.stack(targets)).sum(0) / weights.sum()
    np.testing.assert_allclose(layer.state["selection_bias"].numpy(), expected, atol=1e-6)


def test_gates_come_from_the_logits_alone() -> None:
    layer = make_layer(QuantileBalancing(), 4, 2)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer.state["selection_bias"].copy_(torch.tensor([-2.0, 2.0, -2.0, 2.0]))
    x = torch.randn(2, 5, 4)
    y, _ = layer(x)
    mask = torch.tensor([False, True, False, True]).expand(2, 5, 4)
    assert torch.equal(layer.record.selection.mask, mask)  # σ is within (0, 1): the bias alone decides
    expected = ReferenceMoE.of(layer).forward(x.double(), mask, "sigmoid", normalize=False)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_number_of_experts_per_token_must_be_whole() -> None:
    with pytest.raises(UserError, match=r"num_experts_per_token=1\.5: QuantileBalancing"):
        make_layer(QuantileBalancing(), 4, 1.5)


def updated_bias(micro_batches: list[Tensor]) -> Tensor:
    layer = make_layer(QuantileBalancing(), micro_batches[0].shape[-1], 2)
    update_by(layer, micro_batches)
    return layer.state["selection_bias"].clone()


def test_the_split_over_ranks_and_steps_does_not_matter(gloo_pair: GlooPair) -> None:
    logits = torch.randn(8, 33, 6).bfloat16().float()
    whole = updated_bias([logits])
    assert torch.equal(updated_bias(list(logits.split(2))), whole)
    for bias in gloo_pair.run(updated_bias, [(list(part.split(2)),) for part in logits.split(4)]):
        assert torch.equal(bias, whole)


@given(st.integers(1, 200), st.sampled_from([1, 2, 3, 0.7]), st.integers(0, 2**31))
def test_the_dynamic_form_is_expert_threshold_without_memory(num_tokens: int, per_token: float, seed: int) -> None:
    """Without the limit of k per token, QB's bias is minus the (1 − rate)-quantile of σ(r): −σ(c) of ET at decay 0.

    A p-quantile is any number with at most p of the sample below it and at least p at or below it.
    """
    logits = torch.randn(1, num_tokens, 8, generator=torch.Generator().manual_seed(seed))
    layer = make_layer(ExpertThreshold(ema_decay=0.0, capacity_factor=None), 8, per_token)
    update_by(layer, [logits])
    threshold = layer.state["threshold"]
    rate = target_count(num_tokens, per_token / 8) / num_tokens  # k/N: the rate that whole tokens allow
    scores = logits[0].double().sigmoid().numpy()
    bias = -threshold.double().sigmoid().numpy()
    assert ((scores + bias < -1e-12).mean(0) <= 1 - rate + 1e-9).all()
    assert ((scores + bias < 1e-12).mean(0) >= 1 - rate - 1e-9).all()
    np.testing.assert_allclose(-bias, np.quantile(scores, 1 - rate, axis=0, method="higher"), atol=1e-12)
    mask = layer.rule.select(logits, layer.state, Phase.TRAIN).mask[0].numpy()
    np.testing.assert_array_equal(mask, scores + bias > 1e-12)


@pytest.mark.parametrize(
    ("name", "fixed_k", "memory"),
    [
        ("quantile_balancing", True, False),
        ("quantile_balancing_ema", True, True),
        ("quantile_threshold", False, False),
        ("quantile_threshold_ema", False, True),
    ],
)
def test_the_four_cells_of_the_family_are_configurations(name: str, fixed_k: bool, memory: bool) -> None:
    rule = rule_from_config(yaml.safe_load((CONF / f"{name}.yaml").read_text())["model"]["routing"])
    assert isinstance(rule, QuantileBalancing if fixed_k else ExpertThreshold)
    assert (rule.ema_decay > 0) == memory
    assert fixed_k or rule.capacity_factor is None
