"""Thresholds and biases: once per optimizer step, from the pooled global batch, and from nothing else."""

from dataclasses import dataclass

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers.foreign_module import LENGTH, ForeignModule, global_batches, make_trainer, micro_batches, tiny_config
from helpers.gloo_pair import GlooPair
from torch import Tensor

from lightning_moe.callbacks import RoutingStateUpdate
from lightning_moe.errors import UserError
from lightning_moe.model import MoELayer
from lightning_moe.module import LanguageModel
from lightning_moe.optim import ScheduleConfig
from lightning_moe.routing import (
    ExpertChoice,
    ExpertThreshold,
    PooledStatistics,
    RoutingRecord,
    RoutingRule,
    RoutingState,
    Selection,
    TokenChoice,
    TokenChoiceAuxLoss,
    TokenChoiceLossFree,
)
from lightning_moe.routing.statistics import micro_batch_statistics, pool_statistics


class Recorder(pl.Callback):
    """Router logits and loads of every training micro-batch, and the state after each."""

    def __init__(self) -> None:
        self.logits: list[list[np.ndarray]] = []  # [micro-batch][layer] of [n, E]
        self.loads: list[list[np.ndarray]] = []
        self.states: list[list[dict[str, np.ndarray]]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: ForeignModule, *args: object) -> None:
        records = [layer.record for layer in pl_module.layers()]
        self.logits.append([record.logits.flatten(0, 1).numpy().copy() for record in records])
        self.loads.append([record.selection.mask.sum((0, 1)).numpy().copy() for record in records])
        states = [layer.state.named_buffers() for layer in pl_module.layers()]
        self.states.append([{name: buffer.numpy().copy() for name, buffer in state} for state in states])


def train(rule: RoutingRule, accumulate: int, steps: int = 4, **options: object) -> Recorder:
    """With a validation after every second micro-batch, which must leave no trace."""
    recorder, module = Recorder(), ForeignModule(rule, **options)
    trainer = make_trainer(
        [RoutingStateUpdate(), recorder], accumulate_grad_batches=accumulate, val_check_interval=2, limit_val_batches=1
    )
    batches = global_batches(steps)
    trainer.fit(module, micro_batches(batches, accumulate), micro_batches(global_batches(1)))
    assert len(recorder.states) == steps * accumulate
    return recorder


@pytest.mark.parametrize("activation_checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("rule", [ExpertThreshold(ema_decay=0.7), ExpertChoice(ema_decay=0.7)], ids=["ET", "EC"])
def test_threshold_is_the_average_of_the_pooled_kth_largest_logits(
    rule: RoutingRule, accumulate: int, activation_checkpointing: bool
) -> None:
    """Recomputed with numpy from the recorded logits, after every micro-batch."""
    recorder = train(rule, accumulate, activation_checkpointing=activation_checkpointing)
    for layer in range(2):
        average, updates = np.zeros(4), 0
        pool: list[np.ndarray] = []
        for index, (logits, states) in enumerate(zip(recorder.logits, recorder.states, strict=True)):
            pool.append(logits[layer])
            if (index + 1) % accumulate == 0:
                pooled = np.concatenate(pool)
                assert pooled.shape == (8 * LENGTH, 4)
                cutoff = np.sort(pooled, axis=0)[::-1][8 * LENGTH // 4 - 1]
                np.testing.assert_array_equal(states[layer]["cutoff"], cutoff)
                average, updates, pool = 0.7 * average + 0.3 * cutoff, updates + 1, []
            if updates:  # between two optimizer steps nothing moves
                np.testing.assert_allclose(states[layer]["threshold"], average / (1 - 0.7**updates), rtol=1e-5)
            else:
                np.testing.assert_array_equal(states[layer]["threshold"], RoutingState(rule, 4, 1)["threshold"].numpy())
        assert updates == 4


@pytest.mark.parametrize("accumulate", [1, 4])
def test_balancing_states_follow_the_pooled_loads(accumulate: int) -> None:
    aux, free = train(TokenChoiceAuxLoss(), accumulate), train(TokenChoiceLossFree(bias_update_rate=0.1), accumulate)
    bias = np.zeros(4)
    for step in range(4):
        last = (step + 1) * accumulate - 1
        steps = slice(step * accumulate, last + 1)
        load = sum(loads[0] for loads in aux.loads[steps])
        np.testing.assert_allclose(aux.states[last][0]["load_fraction"], load * 4 / (8 * LENGTH), rtol=1e-6)
        load = sum(loads[0] for loads in free.loads[steps])
        bias = bias + 0.1 * np.sign(load.mean() - load)
        bias -= bias.mean()
        np.testing.assert_allclose(free.states[last][0]["selection_bias"], bias, atol=1e-6)


def test_micro_batches_of_different_sizes_count_by_their_tokens() -> None:
    """The last batches of an epoch may be smaller."""
    recorder, module = Recorder(), ForeignModule(TokenChoiceAuxLoss())
    batches = global_batches(2)
    short = {name: tensor[:3] for name, tensor in batches[1].items()}
    trainer = make_trainer([RoutingStateUpdate(), recorder], accumulate_grad_batches=2)
    trainer.fit(module, micro_batches([batches[0], short]))
    load = recorder.loads[0][0] + recorder.loads[1][0]
    assert load.sum() == 11 * LENGTH
    np.testing.assert_allclose(recorder.states[1][0]["load_fraction"], load * 4 / (11 * LENGTH), rtol=1e-6)


def test_a_step_without_a_loss_leaves_the_state_alone() -> None:
    """Where ``training_step`` returns `None`, Lightning announces an optimizer step all the same."""

    class Skipping(ForeignModule):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    recorder, module = Recorder(), Skipping(ExpertThreshold())
    make_trainer([RoutingStateUpdate(), recorder]).fit(module, micro_batches(global_batches(3)))
    thresholds = [states[0]["threshold"] for states in recorder.states]
    np.testing.assert_array_equal(thresholds[0], thresholds[1])
    assert (thresholds[1] != thresholds[2]).any()


@dataclass(frozen=True)
class Halves(RoutingRule):
    """A third party's rule with a state of its own: the share of tokens sent to the first expert."""

    def initial_state(self, num_experts: int, num_experts_per_token: float) -> dict[str, Tensor]:
        return {"share": torch.zeros(1)}

    def select(self, logits: Tensor, state: RoutingState, phase: object) -> Selection:
        mask = torch.zeros_like(logits, dtype=torch.bool)
        mask[..., 0] = logits[..., 0] > 0
        mask[..., 1] = ~mask[..., 0]
        return Selection(mask)

    def update(self, state: RoutingState, statistics: PooledStatistics) -> None:
        state["share"].copy_(statistics.load[:1] / statistics.num_tokens)


def test_a_rule_of_a_third_party_gets_the_pooled_statistics() -> None:
    recorder = train(Halves(), accumulate=2)
    load = recorder.loads[0][1] + recorder.loads[1][1]
    np.testing.assert_allclose(recorder.states[1][1]["share"], load[:1] / (8 * LENGTH), rtol=1e-6)


def test_a_pool_over_ranks_refuses_accumulation() -> None:
    trainer = make_trainer([RoutingStateUpdate()], accumulate_grad_batches=2)
    with pytest.raises(UserError, match=r"trainer\.accumulate_grad_batches=2: ExpertChoice with a global pool"):
        trainer.fit(ForeignModule(ExpertChoice(pool="global")), micro_batches(global_batches(2), 2))


def statistics_of(rule: RoutingRule, parts: list[list[Tensor]]) -> list[tuple[Tensor, ...]]:
    """Of layers whose logits [B, S, E] came as the micro-batches ``parts[layer]``."""
    layers = [MoELayer(tiny_config(), rule, rate) for rate, _ in zip((1, 2), parts, strict=True)]
    named = {f"layer_{i:02d}": layer for i, layer in enumerate(layers)}
    observations = []
    for logits_of_layers in zip(*parts, strict=True):
        for layer, logits in zip(layers, logits_of_layers, strict=True):
            layer.record = RoutingRecord(logits, rule.select(logits, layer.state, layer.phase))
        observations.append({name: micro_batch_statistics(layer.record, layer.state) for name, layer in named.items()})
    pooled = pool_statistics({name: layer.state for name, layer in named.items()}, observations)
    empty = torch.empty(0)
    return [(s.num_tokens, s.load, empty if s.cutoff is None else s.cutoff) for s in pooled.values()]


@pytest.mark.parametrize(
    "rule",
    [ExpertThreshold(ema_decay=0.9, capacity_factor=None), TokenChoiceAuxLoss(), TokenChoiceLossFree()],
    ids=["ET", "aux", "loss_free"],
)
def test_equal_logits_give_equal_bits_however_they_are_split(gloo_pair: GlooPair, rule: RoutingRule) -> None:
    """1 process; 4 uneven micro-batches; 2 processes of unequal shares; 2 processes with 2 and 3 micro-batches."""
    logits = [torch.randn(12, 5, 4), torch.randn(12, 5, 4).bfloat16().float()]
    whole = statistics_of(rule, [[layer] for layer in logits])
    assert [s[0].item() for s in whole] == [60, 60]

    def of_ranks(first: list[int], second: list[int]) -> list[list[tuple[Tensor, ...]]]:
        cut = sum(first)
        return gloo_pair.run(
            statistics_of,
            [
                (rule, [list(layer[:cut].split(first)) for layer in logits]),
                (rule, [list(layer[cut:].split(second)) for layer in logits]),
            ],
        )

    splits = [statistics_of(rule, [list(layer.split([1, 5, 2, 4])) for layer in logits])]
    splits += of_ranks([7], [5])
    splits += of_ranks([2, 4], [1, 3, 2])
    for split in splits:
        for actual, expected in zip(split, whole, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("rule", [ExpertThreshold(), TokenChoiceLossFree()], ids=lambda rule: type(rule).__name__)
def test_our_module_is_refused_without_the_callback(rule: RoutingRule) -> None:
    module = LanguageModel(tiny_config(), rule, schedule=ScheduleConfig(adamw_warmup_steps=1))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(UserError, match=rf"{type(rule).__name__} needs.*Trainer\(callbacks=\[RoutingStateUpdate\(\)\]"):
        make_trainer([]).fit(module, micro_batches(global_batches(2)))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("rule", [TokenChoice(), None], ids=str)
def test_a_rule_without_updates_needs_no_callback(rule: RoutingRule | None) -> None:
    module = LanguageModel(tiny_config(), rule, schedule=ScheduleConfig(adamw_warmup_steps=1))
    trainer = make_trainer([])
    trainer.fit(module, micro_batches(global_batches(2)))
    assert trainer.global_step == 2


def test_a_callback_of_ones_own_may_do_the_updates() -> None:
    class Own(pl.Callback):
        updates_routing_state = True

    trainer = make_trainer([Own()])
    module = LanguageModel(tiny_config(), ExpertThreshold(), schedule=ScheduleConfig(adamw_warmup_steps=1))
    trainer.fit(module, micro_batches(global_batches(2)))
    assert trainer.global_step == 2


@pytest.mark.parametrize(
    ("rule", "callbacks", "warns"),
    [
        (ExpertThreshold(), [], True),
        (TokenChoiceLossFree(), [], True),
        (ExpertThreshold(), [RoutingStateUpdate()], False),
        (TokenChoiceLossFree(), [RoutingStateUpdate()], False),
        (TokenChoice(), [], False),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, bool) else str(value),
)
def test_somebody_elses_module_warns_without_the_callback(
    rule: RoutingRule, callbacks: list[pl.Callback], warns: bool, recwarn: pytest.WarningsRecorder
) -> None:
    batches = micro_batches(global_batches(2))
    make_trainer(callbacks).fit(ForeignModule(rule, num_experts=1), batches, batches)
    found = [str(warning.message) for warning in recwarn if "routing state" in str(warning.message)]
    assert bool(found) == warns
    assert all("Trainer(callbacks=[RoutingStateUpdate()]" in message for message in found)
    evaluated = ForeignModule(rule)
    recwarn.clear()
    make_trainer([]).validate(evaluated, batches, verbose=False)
    assert not [warning for warning in recwarn if "routing state" in str(warning.message)]
