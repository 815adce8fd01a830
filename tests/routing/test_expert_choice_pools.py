"""Expert choice in pools of n sequences and over ranks, against sorting; in real training on two processes."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.gloo_pair import GlooPair
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_moe.callbacks import RoutingStateUpdate, ThresholdWarmup
from lightning_moe.errors import UserError
from lightning_moe.model import DecoderConfig
from lightning_moe.module import LanguageModel
from lightning_moe.optim import OptimizerConfig, ScheduleConfig
from lightning_moe.routing import ExpertChoice, ExpertThreshold, Phase, RoutingRule, RoutingState
from lightning_moe.routing.expert_choice import Pool


@st.composite
def router_logits(draw: st.DrawFn, batch: int | None = None) -> Tensor:
    """fp32 [B, S, 3]; coarsely rounded ones are full of ties."""
    shape = (draw(st.integers(1, 6)) if batch is None else batch, draw(st.integers(1, 8)), 3)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    return logits.round() if draw(st.booleans()) else logits


def select(rule: RoutingRule, logits: Tensor, per_token: float, phase: Phase = Phase.TRAIN) -> Tensor:
    return rule.select(logits, RoutingState(rule, logits.shape[-1], per_token), phase).mask


def top_of_pool(logits: Tensor, rate: float) -> Tensor:
    """The slow rule on one pool [n, S, E]: sort, the earlier token first among equals, take k."""
    tokens = logits.flatten(0, 1)
    k = min(max(int(len(tokens) * rate + 0.5), 1), len(tokens))
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for expert, scores in enumerate(tokens.t().tolist()):
        for token in sorted(range(len(tokens)), key=lambda t: (-scores[t], t))[:k]:
            mask[token, expert] = True
    return mask.view_as(logits)


@pytest.mark.parametrize("sequences", [1, 2, 3, 6])
@given(logits=router_logits(batch=6), per_token=st.sampled_from([0.3, 1, 2, 3]))
def test_neighbouring_sequences_form_a_pool(sequences: int, logits: Tensor, per_token: float) -> None:
    expected = torch.cat([top_of_pool(pool, per_token / 3) for pool in logits.split(sequences)])
    assert torch.equal(select(ExpertChoice(pool=sequences), logits, per_token), expected)


@given(logits=router_logits(), per_token=st.sampled_from([0.3, 1, 3]))
def test_named_pools_are_numbers_of_sequences(logits: Tensor, per_token: float) -> None:
    for name, sequences in (("sequence", 1), ("micro_batch", len(logits)), ("global", len(logits))):
        assert torch.equal(
            select(ExpertChoice(pool=name), logits, per_token), select(ExpertChoice(pool=sequences), logits, per_token)
        )


@given(data=st.data(), per_token=st.sampled_from([0.3, 1, 2, 3]))
def test_global_pool_is_sorting_all_ranks_tokens(gloo_pair: GlooPair, data: st.DataObject, per_token: float) -> None:
    """Exactly, with ties in the order of ranks, and with ranks of different size."""
    logits = data.draw(router_logits(batch=5))
    first = data.draw(st.integers(1, 4))
    parts = (logits[:first], logits[first:])
    masks = gloo_pair.run(select, [(ExpertChoice(pool="global"), part, per_token) for part in parts])
    assert torch.equal(torch.cat(masks), top_of_pool(logits, per_token / 3))


@pytest.mark.parametrize("pool", ["sequence", 2, "micro_batch", "global"])
def test_the_warm_up_of_expert_threshold_uses_the_same_pools(pool: Any, gloo_pair: GlooPair) -> None:
    logits = torch.randn(4, 16, 3)
    rules = ExpertThreshold(warmup_pool=pool), ExpertChoice(pool=pool)
    masks = [
        torch.cat(gloo_pair.run(select, [(rule, part, 1, phase) for part in logits.split(2)]))
        for rule, phase in zip(rules, (Phase.WARMUP, Phase.TRAIN), strict=True)
    ]
    assert torch.equal(masks[0], masks[1])


def test_inference_does_not_pool() -> None:
    logits = torch.randn(2, 8, 3)
    rule = ExpertChoice(pool="global")
    state = RoutingState(rule, 3, 1)
    assert torch.equal(rule.select(logits, state, Phase.CAUSAL).mask, logits > state["threshold"])


@pytest.mark.parametrize("pool", ["batch", 0, -2, True, 1.5, None])
def test_another_pool_is_refused(pool: Any) -> None:
    with pytest.raises(UserError, match=r"model\.routing\.pool="):
        ExpertChoice(pool=pool)
    with pytest.raises(UserError, match=r"model\.routing\.warmup_pool="):
        ExpertThreshold(warmup_pool=pool)


def test_sequences_that_do_not_fill_the_pools_are_refused() -> None:
    with pytest.raises(UserError, match="pools of 4 sequences, but a micro-batch has 6"):
        select(ExpertChoice(pool=4), torch.randn(6, 2, 3), 1)


STEPS, GLOBAL_BATCH = 6, 4


def train(
    rule: RoutingRule, rank: int, strategy: str, checkpointing: bool = False, accumulate: int = 1
) -> dict[str, Tensor]:
    """A few steps of a tiny model; each rank gets its neighbouring sequences of every global batch."""
    world_size = 1 if strategy == "auto" else 2
    sharded = ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
    torch.manual_seed(3)
    config = DecoderConfig(
        vocab_size=32,
        max_sequence_length=16,
        hidden_size=16,
        num_layers=3,
        num_attention_heads=2,
        num_experts=4,
        activation_checkpointing=checkpointing,
    )
    smooth = OptimizerConfig(matrix_rule="adamw", adamw_eps=1e-3)  # does not blow rounding up to whole steps
    model = LanguageModel(config, rule, smooth, ScheduleConfig(adamw_warmup_steps=1))
    tokens = torch.randint(0, 32, (STEPS, world_size, GLOBAL_BATCH // world_size, 17))
    rows = [{"input_ids": row[:-1], "labels": row[1:]} for row in tokens[:, rank].flatten(0, 1)]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=sharded if strategy == "fsdp" else strategy,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RoutingStateUpdate(), ThresholdWarmup()],
    )
    trainer.fit(model, DataLoader(rows, batch_size=GLOBAL_BATCH // world_size // accumulate))  # type: ignore[arg-type]
    assert trainer.global_step == STEPS
    state = model.state_dict()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def largest_difference(state: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max((value - other[name]).abs().max().item() for name, value in state.items() if value.is_floating_point())


@pytest.mark.parametrize(
    ("pool", "strategy", "checkpointing"),
    [("global", "ddp", False), ("global", "ddp", True), ("global", "fsdp", False), ("global", "fsdp", True),
     (2, "ddp", False)],
)  # fmt: skip
def test_training_does_not_depend_on_the_ranks(
    gloo_pair: GlooPair, pool: Pool, strategy: str, checkpointing: bool
) -> None:
    """Two processes, with and without recomputation (which calls the global pool's collectives again), equal one."""
    rule = ExpertChoice(pool=pool)
    whole = train(rule, 0, "auto")
    for state in gloo_pair.run(train, [(rule, rank, strategy, checkpointing) for rank in (0, 1)]):
        assert largest_difference(state, whole) < 1e-5


def test_training_with_a_micro_batch_pool_does(gloo_pair: GlooPair) -> None:
    rule = ExpertChoice(pool="micro_batch")
    whole = train(rule, 0, "auto")
    split = gloo_pair.run(train, [(rule, rank, "ddp") for rank in (0, 1)])
    assert largest_difference(split[0], whole) > 1e-3


@pytest.mark.parametrize("rule", [ExpertChoice(pool="global"), ExpertThreshold(warmup_pool="global")])
def test_a_global_pool_refuses_accumulation(rule: RoutingRule) -> None:
    with pytest.raises(UserError, match=r"trainer\.accumulate_grad_batches=2: Expert(Choice|Threshold) with a global"):
        train(rule, 0, "auto", accumulate=2)
