"""The plan's bytes against what torch's allocator hands out in real training steps, and against counts by hand."""

import gc
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from lightning_moe.errors import UserError
from lightning_moe.model import Decoder, DecoderConfig
from lightning_moe.optim import OptimizerConfig, build_optimizer
from lightning_moe.plan import MemoryPlan, memory_plan, saved_activations
from lightning_moe.plan.memory import Strategy
from lightning_moe.routing import ExpertChoice, ExpertThreshold, RoutingRule

BATCH = 4
TINY = DecoderConfig(vocab_size=1024, max_sequence_length=128)


def measured(config: DecoderConfig, rule: RoutingRule | None, precision: str) -> tuple[int, int, int]:
    """Bytes of (weights and optimizer state, what a forward pass leaves, the peak) by the allocator's events.

    A step of two micro-batches after a first step, so that gradients and optimizer state are there.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        model = Decoder(config, rule)
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        optimizer = build_optimizer(model, OptimizerConfig(), torch.float32)
        ids = torch.randint(0, config.vocab_size, (BATCH, config.max_sequence_length))

        def forward() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                return model(ids, labels=ids).loss

        forward().backward()
        optimizer.step()
        optimizer.zero_grad()
        with record_function("start"):
            pass
        loss = forward()
        with record_function("middle"):
            pass
        loss.backward()
        forward().backward()
        with record_function("end"):
            pass
    events = sorted(prof.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    marks, live, now = dict.fromkeys(("start", "middle", "end"), 0), [0], 0
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            live.append(now)
        elif event.name() in marks:
            marks[event.name()] = len(live)
    fixed = live[marks["start"] - 1]
    return fixed, live[marks["middle"] - 1] - fixed, max(live[marks["start"] : marks["end"]])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rule", [ExpertChoice(), None], ids=["routed", "dense"])
def test_within_a_tenth_of_what_the_allocator_gives(
    rule: RoutingRule | None, checkpointing: bool, precision: str
) -> None:
    config = replace(TINY, activation_checkpointing=checkpointing)
    saved = saved_activations(config, rule, BATCH, precision)
    plan = memory_plan(config, rule, OptimizerConfig(), saved, precision, "single", 1)
    fixed, kept, peak = measured(config, rule, precision)
    assert plan.parameters + plan.optimizer == pytest.approx(fixed, rel=0.02)
    if not checkpointing:
        assert plan.activations - saved.workspace == pytest.approx(kept, rel=0.1)
    assert plan.total(checkpointing) == pytest.approx(peak, rel=0.1)


def test_shares_of_each_strategy_by_hand() -> None:
    """V=10, D=8, 2 layers (1 dense), 4 + 1 experts of 12; all matrices of blocks under Muon."""
    config = DecoderConfig(
        vocab_size=10, max_sequence_length=6, hidden_size=8, num_layers=2, num_attention_heads=2, num_experts=4,
        expert_hidden_size=12,
    )  # fmt: skip
    attention, experts, shared, router, dense, matrix = 4 * 64, 4 * 2 * 8 * 12, 2 * 8 * 12, 4 * 8, 2 * 8 * 24, 80
    blocks = [attention + dense, attention + experts + shared + router]
    weights = 4 * (2 * matrix + sum(blocks))
    rule = ExpertChoice()
    saved = saved_activations(config, rule, 2, "32-true")

    def plan(strategy: Strategy, devices: int = 4, group: int = 1) -> MemoryPlan:
        return memory_plan(config, rule, OptimizerConfig(), saved, "32-true", strategy, devices, group)

    single, ddp, fsdp, expert = plan("single"), plan("ddp"), plan("fsdp"), plan("expert_parallel", group=2)
    assert single.parameters == single.gradients == ddp.parameters == ddp.communication == weights
    assert single.optimizer == weights + 4 * 2 * matrix  # the embedding and the head have a second moment
    assert single.communication == single.communication_checkpointed == 0
    assert ddp.communication_checkpointed == weights
    assert fsdp.parameters * 4 == weights
    assert fsdp.optimizer * 4 == single.optimizer
    assert fsdp.communication_checkpointed == 4 * (2 * matrix + sum(blocks) + max(2 * matrix, *blocks))
    freed = saved.head + saved.workspace
    inside = fsdp.communication_checkpointed - freed
    assert fsdp.communication == max(4 * (2 * matrix + max(blocks)), inside)
    halved = [blocks[0], blocks[1] - experts // 2]
    assert expert.communication_checkpointed == 4 * (2 * matrix + sum(halved) + max(2 * matrix, *halved))
    assert expert.communication == max(4 * (2 * matrix + max(halved)), expert.communication_checkpointed - freed)
    alone = [blocks[0], blocks[1] - experts]  # four groups' worth of experts on four devices: nothing to gather
    whole = plan("expert_parallel", group=4)
    assert whole.communication_checkpointed == 4 * (2 * matrix + sum(alone) + max(2 * matrix, *alone))
    assert expert.parameters == fsdp.parameters


def test_more_experts_per_token_keep_more() -> None:
    """The hidden activations of each further pair: one number per hidden unit, four numbers beside."""
    one, two = (
        saved_activations(
            replace(TINY, num_experts_per_token=rate, dense_hidden_size=512), ExpertChoice(), 1, "32-true"
        )
        for rate in (1, 2)
    )
    pair = 4 * TINY.expert_size + 8 + 4 + 8 + 8  # hidden, cell, gate, token, place in the order of tokens
    assert [b.saved - a.saved for a, b in zip(one.blocks, two.blocks, strict=True)] == [0, *[128 * pair] * 3]


def test_pairs_have_the_room_that_a_gpu_gives_them() -> None:
    """The bound of the capacity, one and a half times the target rate; the rate where nothing bounds them."""
    bounded, exact = (
        saved_activations(TINY, ExpertThreshold(capacity_factor=factor), 1, "32-true") for factor in (0.5, None)
    )
    pair = 4 * TINY.expert_size + 8 + 4 + 8 + 8  # as above
    more = TINY.max_sequence_length // 2 * pair
    assert [b.saved - a.saved for a, b in zip(exact.blocks, bounded.blocks, strict=True)] == [0, *[more] * 3]


def test_groups_and_precisions_that_do_not_fit_are_refused() -> None:
    saved = saved_activations(TINY, None, 1, "32-true")
    with pytest.raises(UserError, match=r"expert_parallel_size=3: must divide --num_gpus=4"):
        memory_plan(TINY, None, OptimizerConfig(), saved, "32-true", "expert_parallel", 4, 3)
    with pytest.raises(UserError, match=r"trainer\.precision='64-true'"):
        saved_activations(TINY, None, 1, "64-true")
