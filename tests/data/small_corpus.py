"""A small corpus in a JSON lines file, a DataModule on it, and a model that notes which windows it was given."""

import json
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_moe.data import LocalFiles, TextDataModule, TokenizerConfig

VOCAB = 300
SEQUENCE = 16

Window = tuple[int, ...]


def write_corpus(path: Path, documents: int = 16, seed: int = 0) -> Path:
    random.seed(seed)
    words = ["".join(random.choices("abcdefgh", k=random.randint(2, 6))) for _ in range(200)]
    texts = [" ".join(random.choices(words, k=random.randint(20, 60))) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def datamodule(folder: Path, **settings: Any) -> TextDataModule:
    file = folder / "corpus.jsonl"
    if not file.exists():
        write_corpus(file)
    defaults = {
        "corpus": LocalFiles([str(file)]),
        "tokenizer": TokenizerConfig(vocab_size=VOCAB),
        "sequence_length": SEQUENCE,
        "global_batch_size": 8,
        "validation_fraction": 0.2,
        "validation_batch_size": 4,
        "cache_dir": str(folder / "cache"),
    }
    return TextDataModule(**{**defaults, **settings})


def ready(module: TextDataModule) -> TextDataModule:
    module.prepare_data()
    module.setup("fit")
    return module


class Stop(Exception):
    """The interruption."""


class Witness(pl.LightningModule):
    """Notes the windows of each optimizer step and when it was validated; can die in a given batch."""

    def __init__(self, die_in_batch: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, 8)
        self.head = nn.Linear(8, VOCAB)
        self.die_in_batch = die_in_batch
        self.batches = 0
        self.steps: dict[int, list[Window]] = {}
        self.validated: list[int] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        if self.batches == self.die_in_batch:
            raise Stop
        self.batches += 1
        self.steps.setdefault(self.trainer.global_step, []).extend(map(tuple, batch["input_ids"].tolist()))
        logits = self.head(self.embedding(batch["input_ids"]))
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        if index == 0:
            self.validated.append(self.trainer.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


def trainer(folder: Path, **settings: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": bool(settings.get("callbacks")),
        "default_root_dir": folder,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "max_epochs": -1,
        "limit_val_batches": 1,
    }
    return pl.Trainer(**{**defaults, **settings})
