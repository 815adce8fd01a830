"""The plan's bytes against what torch's allocator hands out in training steps under `fit`'s strategies.

The second process is torch's fake group: collectives return at once and leave their buffers as they are. With gloo its
threads would hold copies for as long as the other process takes, and free them unseen by the profiler.
"""

import gc
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.foreign_module import make_trainer
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import DataLoader

from lightning_moe.callbacks import RoutingStateUpdate
from lightning_moe.model import DecoderConfig
from lightning_moe.module import LanguageModel
from lightning_moe.optim import OptimizerConfig, ScheduleConfig
from lightning_moe.plan import memory_plan, saved_activations
from lightning_moe.plan.memory import Strategy
from lightning_moe.routing import ExpertChoice
from lightning_moe.training.strategy import FullyShardedStrategy

RULE = ExpertChoice()  # the number of token-expert pairs is then the plan's
CONFIG = DecoderConfig(vocab_size=1024, max_sequence_length=128)
SEQUENCES = 4  # of a micro-batch


class Marks(pl.Callback):
    """Marks the third step: between forward and backward of its second micro-batch, and from its start to its end.

    Optimizer state is there by then, and DDP has rebuilt its buckets.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.model, DistributedDataParallel):
            trainer.model.register_comm_hook(None, unchanged)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if index == 4:
            self.mark("start")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx == 5:
            self.mark("between")

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if trainer.global_step == 2:
            self.mark("end")

    def mark(self, name: str) -> None:
        with record_function(name):
            pass


def unchanged(state: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The all-reduce of DDP's gradients, which the fake group does not know how to answer."""
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def join_fake_group() -> None:
    """As the first of two processes."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())


@pytest.fixture(scope="module")
def first_of_two() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), join_fake_group) as pool:
        yield pool


def held_in_a_step(strategy: Strategy, config: DecoderConfig) -> tuple[int, int]:
    """Bytes that this process holds between forward and backward, and at most in both."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"strategy": "auto", "devices": 1} if strategy == "single" else {"devices": 2}
    if strategy == "ddp":
        options["strategy"] = "ddp"
    elif strategy != "single":
        options["strategy"] = FullyShardedStrategy(expert_parallel_size=2 if strategy == "expert_parallel" else 1)
    ids = torch.randint(0, config.vocab_size, (SEQUENCES, config.max_sequence_length))
    batches = DataLoader([{"input_ids": ids, "labels": ids}] * 6, batch_size=None)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        module = LanguageModel(config, RULE, schedule=ScheduleConfig(adamw_warmup_steps=1))
        trainer = make_trainer([Marks(), RoutingStateUpdate()], accumulate_grad_batches=2, **options)
        trainer.fit(module, batches)
    live, marks = [0], {}
    for event in sorted(prof.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live.append(live[-1] + event.nbytes())
        elif event.name() in ("start", "between", "end"):
            marks[event.name()] = len(live)
    return live[marks["between"] - 1], max(live[marks["start"] : marks["end"]])


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp", "expert_parallel"])
def test_within_a_twentieth_of_what_a_process_holds(
    first_of_two: ProcessPoolExecutor, strategy: Strategy, checkpointing: bool
) -> None:
    config = replace(CONFIG, activation_checkpointing=checkpointing)
    saved = saved_activations(config, RULE, SEQUENCES, "32-true")
    group = 2 if strategy == "expert_parallel" else 1
    plan = memory_plan(config, RULE, OptimizerConfig(), saved, "32-true", strategy, 2, group)
    if strategy == "single":
        kept, most = held_in_a_step(strategy, config)
    else:
        kept, most = first_of_two.submit(held_in_a_step, strategy, config).result()
    blocks = [block.input if checkpointing else block.saved for block in saved.blocks]
    root = 2 * 4 * config.vocab_size * config.hidden_size  # embedding and head, which FSDP2 keeps until the next step
    exchanged = {"single": 0, "ddp": plan.communication}.get(strategy, root)
    between = plan.parameters + plan.gradients + plan.optimizer + exchanged
    assert kept == pytest.approx(between + saved.embedding + sum(blocks) + saved.head, rel=0.05)
    assert most == pytest.approx(plan.total(checkpointing), rel=0.05)
