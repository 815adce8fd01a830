"""The same global batches give the same thresholds, biases, loads and losses, however they are split.

Splits: one process; accumulation; two processes under DDP and under FSDP2, each with accumulation too; activation
checkpointing; compiled blocks. Not under this law, because they choose among the tokens of one micro-batch: the warm-up
of expert threshold, expert choice with the pool ``micro_batch``, and expert threshold's capacity (see the last test).
"""

import functools
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.foreign_module import ForeignModule, global_batches, make_trainer, micro_batches
from helpers.gloo_pair import GlooPair
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_moe.callbacks import FiniteGuard, LoadBalance, RoutingStateUpdate, ThresholdWarmup
from lightning_moe.routing import (
    ExpertChoice,
    ExpertThreshold,
    QuantileBalancing,
    RoutingRule,
    TokenChoiceAuxLoss,
    TokenChoiceLossFree,
)

RULES = {
    "ET": ExpertThreshold(ema_decay=0.9, capacity_factor=None),
    "aux": TokenChoiceAuxLoss(aux_loss_coef=0.1),
    "loss_free": TokenChoiceLossFree(bias_update_rate=0.05),
    "QB": QuantileBalancing(ema_decay=0.5),
}


@dataclass(frozen=True)
class Layout:
    strategy: str = "auto"  # auto: one process; ddp or fsdp: two
    accumulate: int = 1
    activation_checkpointing: bool = False
    router: str = "linear"
    compile: bool = False


class States(pl.Callback):
    """Copies of all routing state after every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: ForeignModule, *args: object) -> None:
        if trainer.global_step > len(self.steps):
            state = {name: buffer.clone() for name, buffer in pl_module.named_buffers() if "state." in name}
            self.steps.append(state)


def train(rule: RoutingRule, layout: Layout, steps: int, rank: int = 0) -> tuple[list[float], list[dict[str, Tensor]]]:
    """This process's mean loss of each step, and the routing state after it."""
    strategies: dict[str, Any] = {
        "auto": "auto",
        "ddp": "ddp",
        "fsdp": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    }
    world_size = 1 if layout.strategy == "auto" else 2
    options = {"activation_checkpointing": layout.activation_checkpointing, "router": layout.router}
    module, states = ForeignModule(rule, compile=layout.compile, **options), States()
    trainer = make_trainer(
        [ThresholdWarmup(), FiniteGuard(), RoutingStateUpdate(), LoadBalance(), states],
        strategy=strategies[layout.strategy],
        devices=world_size,
        accumulate_grad_batches=layout.accumulate,
    )
    trainer.fit(module, micro_batches(global_batches(steps), layout.accumulate, rank, world_size))
    return torch.tensor(module.losses).view(steps, layout.accumulate).mean(1).tolist(), states.steps


train_alone = functools.cache(train)


def run(pair: GlooPair, rule: RoutingRule, layout: Layout, steps: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Losses over the global batch, and the states, which all ranks must agree on to the bit."""
    if layout.strategy == "auto":
        losses, states = train_alone(rule, layout, steps)
        return torch.tensor(losses), states
    (losses, states), (other_losses, other_states) = pair.run(train, [(rule, layout, steps, rank) for rank in (0, 1)])
    for state, other in zip(states, other_states, strict=True):
        assert all(torch.equal(state[name], other[name]) for name in state)
    return (torch.tensor(losses) + torch.tensor(other_losses)) / 2, states


def assert_same(pair: GlooPair, rule: RoutingRule, layout: Layout, steps: int, router: str = "linear") -> None:
    expected_losses, expected_states = run(pair, rule, Layout(router=router), steps)
    losses, states = run(pair, rule, layout, steps)
    assert len(states) == steps
    torch.testing.assert_close(losses, expected_losses, rtol=0, atol=1e-4)
    for state, expected in zip(states, expected_states, strict=True):
        assert state.keys() == expected.keys()
        assert len(state) >= 2
        for name, buffer in expected.items():
            torch.testing.assert_close(state[name], buffer, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert expected_losses[-1] < expected_losses[0]  # it learned: the comparison is not of constants


@pytest.mark.parametrize("layout", [Layout("ddp", 2), Layout("fsdp", 2)], ids=str)
def test_two_processes_with_two_accumulation_steps_are_one(gloo_pair: GlooPair, layout: Layout) -> None:
    assert_same(gloo_pair, RULES["ET"], layout, steps=5)


LAYOUTS = [
    Layout(accumulate=4),
    Layout(activation_checkpointing=True),
    Layout("ddp"),
    Layout("fsdp"),
    Layout("ddp", 2),
    Layout("fsdp", 2),
    Layout("ddp", 2, activation_checkpointing=True),
    Layout("fsdp", 2, activation_checkpointing=True),
]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_twenty_steps_are_the_same_in_every_layout(gloo_pair: GlooPair, rule: str, layout: Layout) -> None:
    assert_same(gloo_pair, RULES[rule], layout, steps=20)


COMPILED = [
    Layout(compile=True),
    Layout(accumulate=4, activation_checkpointing=True, compile=True),
    Layout("ddp", 2, compile=True),
    Layout("fsdp", 2, compile=True),
]


@pytest.mark.slow
@pytest.mark.parametrize("layout", COMPILED, ids=str)
def test_compiled_blocks_train_the_same_in_every_layout(gloo_pair: GlooPair, layout: Layout) -> None:
    assert_same(gloo_pair, RULES["ET"], layout, steps=20)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_cosine_router_trains_on_two_processes(gloo_pair: GlooPair, strategy: str) -> None:
    assert_same(gloo_pair, RULES["ET"], Layout(strategy, router="cosine"), steps=3, router="cosine")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_experts_without_a_token_hang_no_process(gloo_pair: GlooPair, strategy: str) -> None:
    """No token is above its threshold on either rank: every parameter still gets a gradient, of zero."""
    rule = Unreachable(ema_decay=0.9, capacity_factor=None)
    assert_same(gloo_pair, rule, Layout(strategy), steps=3)


@dataclass(frozen=True)
class Unreachable(ExpertThreshold):
    """Expert threshold that selects nothing."""

    def select(self, logits: Tensor, state: Any, phase: Any) -> Any:
        return super().select(logits - 1000.0, state, phase)


@pytest.mark.parametrize(
    "rule", [ExpertChoice(), ExpertThreshold(capacity_factor=0.1)], ids=["EC_micro_batch", "capacity"]
)
def test_rules_that_pool_a_micro_batch_do_depend_on_the_split(gloo_pair: GlooPair, rule: RoutingRule) -> None:
    """The law above is not vacuous: these choose among the tokens of a micro-batch, and say so."""
    whole, _ = run(gloo_pair, rule, Layout(), 4)
    split, _ = run(gloo_pair, rule, Layout(accumulate=4), 4)
    assert (whole - split).abs().max() > 1e-3
