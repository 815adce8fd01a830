"""What each rule stores after a step, against numbers worked out by hand."""

import math
from statistics import NormalDist

import pytest
import torch

from lightning_moe.routing import (
    ExpertChoice,
    ExpertThreshold,
    PooledStatistics,
    RoutingRule,
    RoutingState,
    TokenChoice,
    TokenChoiceAuxLoss,
    TokenChoiceLossFree,
)


def statistics(load: list[int], num_tokens: int, cutoff: list[float] | None = None) -> PooledStatistics:
    """``sketch`` as for scores that are all alike."""
    if cutoff is None:
        return PooledStatistics(torch.tensor(num_tokens), torch.tensor(load))
    values = torch.tensor(cutoff)
    rates = ExpertThreshold().sketch_rates(1 / len(cutoff))
    return PooledStatistics(torch.tensor(num_tokens), torch.tensor(load), values, values.repeat(len(rates), 1))


@pytest.mark.parametrize("rule", [ExpertThreshold(ema_decay=0.9), ExpertChoice(ema_decay=0.9)])
def test_threshold_is_the_bias_corrected_average(rule: RoutingRule) -> None:
    """c: 0.1·2 = 0.2; 0.9·0.2 + 0.1·4 = 0.58; 0.9·0.58 + 0.1·(−1) = 0.422; over 0.1, 0.19, 0.271."""
    state = RoutingState(rule, 2, 1)
    for cutoff, threshold in [(2.0, 2.0), (4.0, 3.0526316), (-1.0, 1.5571956)]:
        rule.update(state, statistics([3, 1], 4, [cutoff, 0.75]))
        torch.testing.assert_close(state["cutoff"], torch.tensor([cutoff, 0.75]), rtol=0, atol=0)
        torch.testing.assert_close(state["threshold"], torch.tensor([threshold, 0.75]), rtol=1e-6, atol=0)
        for row in state["sketch"]:  # the same average of the other cutoffs
            assert torch.equal(row, state["threshold"])


def test_without_decay_the_threshold_is_the_last_cutoff() -> None:
    rule = ExpertThreshold(ema_decay=0.0)
    state = RoutingState(rule, 1, 1)
    for cutoff in (0.5, -2.25):
        rule.update(state, statistics([1], 4, [cutoff]))
        assert state["threshold"].item() == cutoff


def test_after_many_updates_the_correction_is_gone() -> None:
    rule = ExpertThreshold(ema_decay=0.999)
    state = RoutingState(rule, 1, 1)
    for _ in range(3000):
        rule.update(state, statistics([1], 4, [1.5]))
    assert abs(state["threshold"].item() - 1.5) < 1e-5  # fp32 rounding of 3000 updates only


@pytest.mark.parametrize(("num_experts", "per_token"), [(16, 1), (4, 2), (8, 0.5)])
def test_first_threshold_lets_the_target_share_of_unit_normal_logits_pass(num_experts: int, per_token: float) -> None:
    state = RoutingState(ExpertThreshold(), num_experts, per_token)
    share = 1 - NormalDist().cdf(state["threshold"][0].item())
    assert share == pytest.approx(per_token / num_experts, rel=1e-5)
    assert RoutingState(ExpertThreshold(), 4, 4)["threshold"].isfinite().all()  # every token to every expert


def test_aux_loss_is_alpha_sum_f_times_p() -> None:
    """Gates 1/2 and 1/5 per token: shares 5/7 and 2/7. f = (2/1)·[3, 1]/4 = [1.5, 0.5]: Σ f P = 17/14."""
    rule = TokenChoiceAuxLoss(aux_loss_coef=0.1)
    state = RoutingState(rule, 2, 1)
    logits = torch.tensor([0.5, 0.2]).logit().expand(1, 3, 2).clone().requires_grad_()
    assert rule.aux_loss(logits, state).item() == pytest.approx(0.1)  # no update yet: f = 1
    rule.update(state, statistics([3, 1], 4))
    assert state["load_fraction"].tolist() == [1.5, 0.5]
    loss = rule.aux_loss(logits, state)
    assert loss.item() == pytest.approx(0.1 * 17 / 14)
    loss.backward()
    assert (logits.grad[..., 0] > 0).all()  # against the loaded expert
    assert (logits.grad[..., 1] < 0).all()


@pytest.mark.parametrize("normalized", [True, False])
def test_both_forms_of_the_aux_loss_are_their_formulas(normalized: bool) -> None:
    """α Σ_i (E/K · n_i/N) P_i and its gradient, written out token by token and expert by expert in float64."""
    rule, load, num_tokens = TokenChoiceAuxLoss(aux_loss_coef=0.02, normalized=normalized), [7, 2, 1, 10], 10
    state = RoutingState(rule, 4, 2)
    rule.update(state, statistics(load, num_tokens))
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)

    def sigmoid(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    expected, gradient = 0.0, torch.zeros(6, 4, dtype=torch.float64)
    f = [4 / 2 * count / num_tokens for count in load]
    for token, row in enumerate(logits.detach().view(6, 4).tolist()):
        gates = [sigmoid(value) for value in row]
        total = sum(gates) if normalized else 1.0
        expected += 0.02 * sum(f[i] * gates[i] / total for i in range(4)) / 6
        for j in range(4):
            pressure = f[j] - (sum(f[i] * gates[i] for i in range(4)) / total if normalized else 0.0)
            gradient[token, j] = 0.02 / 6 * gates[j] * (1 - gates[j]) * pressure / total
    loss = rule.aux_loss(logits, state)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(logits.grad.view(6, 4), gradient, rtol=1e-6, atol=1e-12)


def test_a_balanced_load_has_fractions_of_one_whatever_k() -> None:
    state = RoutingState(TokenChoiceAuxLoss(), 4, 2)
    state.rule.update(state, statistics([6, 6, 6, 6], 12))
    assert state["load_fraction"].tolist() == [1.0] * 4


def test_loss_free_bias_moves_by_u_against_the_load_and_stays_centred() -> None:
    """Loads [7, 1, 3, 1], mean 3: signs [−1, 1, 0, 1], mean 1/4; u = 0.1."""
    rule = TokenChoiceLossFree(bias_update_rate=0.1)
    state = RoutingState(rule, 4, 1)
    rule.update(state, statistics([7, 1, 3, 1], 12))
    torch.testing.assert_close(state["selection_bias"], torch.tensor([-0.125, 0.075, -0.025, 0.075]))
    rule.update(state, statistics([3, 3, 3, 3], 12))  # balanced: nothing moves
    torch.testing.assert_close(state["selection_bias"], torch.tensor([-0.125, 0.075, -0.025, 0.075]))
    for step in range(500):
        rule.update(state, statistics([step % 7, 3, step % 2, 5], 12))
    assert abs(state["selection_bias"].mean().item()) < 1e-6


def test_the_bias_acts_on_the_selection_and_not_on_the_gate() -> None:
    rule = TokenChoiceLossFree()
    state = RoutingState(rule, 2, 1)
    state["selection_bias"].copy_(torch.tensor([-1.0, 1.0]))
    assert rule.selection_scores(torch.tensor([[[0.5, 0.0]]]), state).argmax() == 1


def test_rules_without_balancing_have_no_aux_loss_and_no_state() -> None:
    state = RoutingState(TokenChoice(), 4, 1)
    assert list(state.buffers()) == []
    for rule in (TokenChoice(), TokenChoiceLossFree(), ExpertChoice(), ExpertThreshold()):
        assert rule.aux_loss(torch.randn(1, 2, 4), RoutingState(rule, 4, 1)) is None


def test_state_is_read_by_name() -> None:
    state = RoutingState(ExpertThreshold(), 4, 1)
    assert "threshold" in state
    assert "selection_bias" not in state
    with pytest.raises(AttributeError, match="selection_bias"):
        state["selection_bias"]
    assert state.rate == 0.25
