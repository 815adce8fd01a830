"""A LightningModule that is not ours but contains a `Decoder`, with what the callbacks' tests need around it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_moe.model import Decoder, DecoderConfig, MoELayer, next_token_loss
from lightning_moe.routing import RoutingRule

Batch = dict[str, Tensor]
LENGTH, VOCABULARY = 16, 32


def tiny_config(**options: Any) -> DecoderConfig:
    """3 layers, the first dense; 4 experts."""
    sizes = {"vocab_size": VOCABULARY, "max_sequence_length": LENGTH, "hidden_size": 16, "num_layers": 3}
    experts = {"num_attention_heads": 2, "num_experts": 4, "expert_hidden_size": 8}
    return DecoderConfig(**{**sizes, **experts, **options})


class ForeignModule(pl.LightningModule):
    """Trains with AdamW; logs the loss of every micro-batch into ``losses``."""

    def __init__(
        self, rule: RoutingRule | None, learning_rate: float = 1e-2, compile: bool = False, **options: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = Decoder(tiny_config(**options), rule)
        for parameter in self.network.parameters():  # those that start at zero would make the experts count for nothing
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
        self.learning_rate, self.compile_blocks = learning_rate, compile
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.compile_blocks:
            self.network.compile_blocks()
        mesh = self.device_mesh if self._trainer is not None else None
        if mesh is not None:
            for block in self.network.blocks:
                fully_shard(block, mesh=mesh["data_parallel"])
            fully_shard(self.network, mesh=mesh["data_parallel"])

    def layers(self) -> list[MoELayer]:
        return list(self.network.moe_layers())

    def loss(self, batch: Batch) -> Tensor:
        output = self.network(batch["input_ids"])
        loss = next_token_loss(output.logits, batch["labels"]).mean()
        return loss if output.aux_loss is None else loss + output.aux_loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def global_batches(steps: int, sequences: int = 8) -> list[Batch]:
    """Random text with a little structure: token t + 1 is often token t + 1 modulo the vocabulary."""
    generator = torch.Generator().manual_seed(7)
    batches = []
    for _ in range(steps):
        ids = torch.randint(0, VOCABULARY, (sequences, LENGTH + 1), generator=generator)
        ids[:, 1::2] = (ids[:, :-1:2] + 1) % VOCABULARY
        batches.append({"input_ids": ids[:, :-1].clone(), "labels": ids[:, 1:].clone()})
    return batches


def micro_batches(batches: list[Batch], accumulate: int = 1, rank: int = 0, world_size: int = 1) -> DataLoader:
    """This rank's micro-batches: each global batch split over accumulation steps, then over ranks."""
    parts = []
    for batch in batches:
        chunks = {name: tensor.chunk(accumulate * world_size) for name, tensor in batch.items()}
        parts += [{name: chunk[a * world_size + rank] for name, chunk in chunks.items()} for a in range(accumulate)]
    return DataLoader(parts, batch_size=None)


class MemoryLogger(Logger):
    """Keeps what was logged: ``logged[step][name]``."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[int, dict[str, float]] = {}

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> str:
        return "0"

    @property
    @rank_zero_experiment
    def experiment(self) -> None:
        return None

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.setdefault(-1 if step is None else step, {}).update(metrics)


def make_trainer(callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    rest = {"enable_checkpointing": False, "max_epochs": 1, "accelerator": "cpu", "devices": 1}
    return pl.Trainer(callbacks=callbacks, use_distributed_sampler=False, **{**quiet, **rest, **options})
