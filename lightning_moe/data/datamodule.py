"""The DataModule: prepares a corpus once, then serves windows of tokens in an order that survives any interruption."""

import dataclasses
import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import lazy_instance  # type: ignore[attr-defined]
from lightning.pytorch.utilities import rank_zero_info

from lightning_moe.data.corpora import Corpus, StandardLibrary
from lightning_moe.data.domains import TokenDomains
from lightning_moe.data.hub_dataset import HubDataset
from lightning_moe.data.prepare import CACHE_VARIABLE, SHARD_SIZE, cache_key, prepare
from lightning_moe.data.resume import align_batch_progress, check_trainer
from lightning_moe.data.split import SPLITS, Split
from lightning_moe.data.streaming import PackedStream, StreamingLoader
from lightning_moe.data.token_store import TOKENIZER, TokenStore
from lightning_moe.data.tokenizer import Tokenizer, TokenizerConfig
from lightning_moe.data.windows import (
    EvaluationSampler,
    Layout,
    TokenWindows,
    TrainingOrder,
    TrainingSampler,
    WindowLoader,
)
from lightning_moe.errors import UserError
from lightning_moe.user_paths import user_path


class TextDataModule(pl.LightningDataModule):
    """Text as batches `{"input_ids", "labels"}`: int64 [B, sequence_length], labels shifted by one, −100 for padding.

    Documents are split by their content, encoded once into the cache folder, packed (each begins with
    `<|endoftext|>`) and cut into windows. Training reads the windows in a random order that `seed` fixes. The position
    in this order counts finished optimizer steps, and it is part of the checkpoint. No Trainer is needed:
    `prepare_data()`, `setup()` and the loaders also work alone.

    Args:
        corpus: Source of the documents.
        tokenizer: Vocabulary size, or a given tokenizer file.
        sequence_length: Tokens in a window.
        global_batch_size: Windows per optimizer step, over all ranks and accumulation steps.
        validation_fraction: Share of the documents that is held out (chosen by content hash).
        validation_batch_size: Windows per batch and rank in validation, test and prediction.
        seed: Random seed of the training order.
        num_workers: Loader processes per rank. Reading a window takes microseconds, so 0 is nearly always right.
        cache_dir: Folder of prepared data. Null: `$LIGHTNING_MOE_CACHE`, or `~/.cache/lightning_moe`.

    Raises:
        UserError: settings, a corpus or a checkpoint do not fit. `__init__`, `prepare_data`, `setup`,
            `load_state_dict` and `train_dataloader` raise it.
    """

    def __init__(
        self,
        corpus: Corpus = lazy_instance(StandardLibrary),  # noqa: B008
        tokenizer: TokenizerConfig = TokenizerConfig(),  # noqa: B008
        sequence_length: int = 256,
        global_batch_size: int = 16,
        validation_fraction: float = 0.02,
        validation_batch_size: int = 16,
        seed: int = 1,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        for key, value in {
            "sequence_length": sequence_length,
            "global_batch_size": global_batch_size,
            "validation_batch_size": validation_batch_size,
        }.items():
            if value < 1:
                raise UserError(f"data.{key}={value} must be at least 1.")
        if not 0 < validation_fraction < 1:
            raise UserError(f"data.validation_fraction={validation_fraction} must be between 0 and 1.")
        self.corpus = corpus
        self.tokenizer_config = tokenizer
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.validation_fraction = validation_fraction
        self.validation_batch_size = validation_batch_size
        self.seed = seed
        self.num_workers = num_workers
        default = os.environ.get(CACHE_VARIABLE) or "~/.cache/lightning_moe"
        self.cache_dir = user_path(cache_dir or default, f"data.cache_dir (or {CACHE_VARIABLE})")
        self._store: TokenStore | None = None
        self._streamed = corpus if isinstance(corpus, HubDataset) and corpus.streaming else None
        self._start = (0, 0)  # (samples, optimizer steps) from which the position counts
        self._stream_state: dict[str, Any] | None = None  # of a streamed corpus, at that position
        self._stream_loader: StreamingLoader | None = None

    @property
    def vocab_size(self) -> int:
        """Number of tokens; known before any data is prepared."""
        return self.tokenizer_config.vocab_size

    # --- preparation

    @cached_property
    def directory(self) -> Path:
        """Folder of the prepared data, whether or not it exists. Its name depends on all that decides its content."""
        return self.cache_dir / cache_key(self.corpus, self.tokenizer_config, self.validation_fraction)

    def prepare_data(self) -> None:
        """Encode the corpus unless the cache has it, and check files that changed. Runs in one process per machine."""
        self.prepare().check()

    def prepare(self, workers: int = 0, shard_size: int = SHARD_SIZE) -> TokenStore:
        """Encode the corpus unless the cache has it, and open the result.

        Args:
            workers: Number of processes that encode; 0 means this one alone.
            shard_size: Characters of text in one file of tokens.
        """
        if not self.directory.exists():
            rank_zero_info(f"Preparing {self.corpus.kind} (once) in {self.directory}")
        splits: tuple[Split, ...] = SPLITS if self._streamed is None else ("validation",)
        config, fraction = self.tokenizer_config, self.validation_fraction
        prepare(self.directory, self.corpus, config, fraction, splits, workers, shard_size)
        return TokenStore(self.directory)

    def adopt_tokenizer(self, text: str) -> None:
        """Encode with the tokenizer of a checkpoint, whatever the corpus or the configured file would give today.

        So a checkpoint can be used where its cache is not, and after the corpus has changed.

        Args:
            text: content of the tokenizer's file, see `Tokenizer.to_text`.
        """
        tokenizer = Tokenizer.from_text(text, "the checkpoint's tokenizer")
        if self._prepared_fingerprint() == tokenizer.fingerprint:
            return
        file = self.cache_dir / "tokenizers" / f"{tokenizer.fingerprint}.json"
        if not _is_tokenizer(file, tokenizer.fingerprint):
            try:
                tokenizer.save(file)
            except OSError as error:
                raise UserError(f"data.cache_dir: {file} cannot be written: {error.strerror}") from None
        self.tokenizer_config = dataclasses.replace(self.tokenizer_config, file=str(file))
        self.__dict__.pop("directory", None)

    def _prepared_fingerprint(self) -> str | None:
        """Return the fingerprint of the tokenizer that the cache has for this configuration; `None` without one."""
        try:
            return Tokenizer.load(self.directory / TOKENIZER).fingerprint
        except UserError:  # not prepared, or the configured file or the corpus is not on this machine
            return None

    def setup(self, stage: str | None = None) -> None:
        """Open the prepared data. `stage="fit"` sets the position to the start."""
        self._store = TokenStore(self.directory)
        if stage == "fit":
            self._start, self._stream_state = (0, 0), None
        if self._streamed is None:
            self._check_training_split()

    def _check_training_split(self) -> None:
        windows = self._windows("train")
        if windows.num_full == 0:
            raise UserError(
                f"data.sequence_length={self.sequence_length} is longer than the training split, which has "
                f"{len(windows.tokens)} tokens (a window takes sequence_length + 1)."
            )
        if windows.num_full < self.global_batch_size:
            raise UserError(
                f"data.global_batch_size={self.global_batch_size} is more than the {windows.num_full} windows of "
                f"{self.sequence_length} tokens in the training split."
            )

    # --- what is available after setup

    @property
    def store(self) -> TokenStore:
        """The prepared data: counts, tokens and document index of each split."""
        if self._store is None:
            raise RuntimeError("TextDataModule.setup() has not run yet")
        return self._store

    @property
    def tokenizer(self) -> Tokenizer:
        return self.store.tokenizer

    @property
    def token_bytes(self) -> torch.Tensor:
        """Bytes of text of each token, int64 [vocab_size]; 0 for special tokens."""
        return self.tokenizer.token_bytes

    def validation_text(self) -> bytes:
        """Return the text of the validation tokens: the documents one after the other."""
        return self.store.text("validation")

    @property
    def fingerprint(self) -> str:
        """Hex digest of corpus, split, tokenizer and packing: equal means the same windows with the same numbers."""
        fields = [
            self.store.manifest["corpus"],
            self.validation_fraction,
            self.tokenizer.fingerprint,
            self.sequence_length,
        ]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, str | int | float]:
        """Return what a tracking system should know about the data."""
        validation = self.store.counts("validation")
        description: dict[str, str | int | float] = {
            "fingerprint": self.fingerprint,
            "corpus": self.corpus.kind,
            "corpus_digest": hashlib.sha256(json.dumps(self.store.manifest["corpus"]).encode()).hexdigest()[:16],
            "tokenizer": self.tokenizer.fingerprint,
            "vocab_size": self.vocab_size,
            "sequence_length": self.sequence_length,
            "validation_fraction": self.validation_fraction,
            "validation_documents": validation.documents,
            "validation_tokens": validation.tokens,
            "validation_bytes": validation.bytes,
        }
        if self._streamed is None:
            train = self.store.counts("train")
            description |= {"train_documents": train.documents, "train_tokens": train.tokens}
        return description

    @property
    def micro_batch_size(self) -> int:
        """Windows that one process takes through the model together in training."""
        accumulate = self.trainer.accumulate_grad_batches if self.trainer is not None else 1
        return self.global_batch_size // (self._replica()[0] * accumulate)

    # --- position

    @property
    def position(self) -> int:
        """Training samples (windows) consumed by finished optimizer steps, over all ranks."""
        samples, steps = self._start
        done = self.trainer.global_step if self.trainer is not None else 0
        return samples + (done - steps) * self.global_batch_size

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the tokenizer and the identity of the data, for the checkpoint."""
        steps = self.trainer.global_step if self.trainer is not None else self._start[1]
        state = {"position": self.position, "global_step": steps, "seed": self.seed, "data": self.describe()}
        state["tokenizer"] = self.tokenizer.to_text()
        if self._stream_loader is not None:
            state["stream"] = self._stream_loader.snapshot()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the checkpoint stopped.

        Raises:
            UserError: the data are not the same.
        """
        now, fitting = self.describe(), self.trainer is None or self.trainer.state.fn == "fit"
        saved = state["data"]
        if saved["tokenizer"] != now["tokenizer"] or (fitting and saved["fingerprint"] != now["fingerprint"]):
            differing = ", ".join(f"data.{k}: {saved.get(k)} → {now[k]}" for k in now if saved.get(k) != now[k])
            raise UserError(
                f"The checkpoint was trained on the data {saved['fingerprint']}, the configuration gives "
                f"{now['fingerprint']} ({differing}). Use the data settings of the checkpoint."
            )
        if fitting and state.get("seed") != self.seed:
            raise UserError(
                f"data.seed={self.seed}, but the checkpoint went through the data in the order of seed "
                f"{state.get('seed')}. Set data.seed={state.get('seed')} to continue it."
            )
        self._start = (state["position"], state["global_step"])
        self._stream_state = state.get("stream")

    # --- loaders

    def train_dataloader(self) -> WindowLoader | StreamingLoader:
        """Return a loader of this rank's micro-batches, from the position on.

        An epoch has as many whole steps as the data give. For a streamed corpus it has `trainer.max_steps`.
        """
        accumulate = self.trainer.accumulate_grad_batches if self.trainer is not None else 1
        layout = Layout(self.global_batch_size, accumulate, *self._replica())
        loader: WindowLoader | StreamingLoader
        if self._streamed is not None:
            batches = self._max_steps() * accumulate
            stream = PackedStream(self._streamed, self.tokenizer, self.validation_fraction, self._stream_state)
            loader = StreamingLoader(
                stream, self.sequence_length, layout, lambda: self.position, batches, self._device()
            )
            self._stream_loader = loader
        else:
            windows = self._windows("train")
            batches = windows.num_full // self.global_batch_size * accumulate
            sampler = TrainingSampler(TrainingOrder(windows.num_full, self.seed), layout, lambda: self.position)
            loader = WindowLoader(windows, sampler, batches, self.num_workers, self._device())
        if self.trainer is not None:
            check_trainer(self.trainer, batches)
            align_batch_progress(self.trainer)
        return loader

    def val_dataloader(self) -> WindowLoader:
        """Return a loader of this rank's validation windows: each token is a label exactly once over all ranks.

        If the text has several domains, the batches also have `domains`, see `TokenWindows`.
        """
        domains = None
        if len(self.store.domain_counts("validation")) > 1:
            documents = self.store.documents("validation")
            domains = TokenDomains(documents["start"], documents["domain"])
        windows = TokenWindows(self.store.tokens("validation"), self.sequence_length, domains)
        sampler = EvaluationSampler(len(windows), self.validation_batch_size, *self._replica())
        return WindowLoader(windows, sampler, len(sampler), self.num_workers, self._device())

    def test_dataloader(self) -> WindowLoader:
        """Return the same loader as `val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> WindowLoader:
        """Return the same loader as `val_dataloader`."""
        return self.val_dataloader()

    def _max_steps(self) -> int:
        steps = self.trainer.max_steps if self.trainer is not None else 2**31
        if steps < 1:
            raise UserError("A streamed corpus has no known end: set trainer.max_steps.")
        return steps

    def _windows(self, split: Split) -> TokenWindows:
        return TokenWindows(self.store.tokens(split), self.sequence_length)

    def _device(self) -> torch.device:
        """Return the device that the trainer moves batches to."""
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _replica(self) -> tuple[int, int]:
        """Return the number of data-parallel replicas and this one's number.

        The first is not the world size if a model is split over ranks.
        """
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (kwargs["num_replicas"], kwargs["rank"]) if kwargs else (1, 0)


def _is_tokenizer(file: Path, fingerprint: str) -> bool:
    """Return whether a file is a tokenizer with this fingerprint; a damaged one is not."""
    try:
        return Tokenizer.load(file).fingerprint == fingerprint
    except UserError:
        return False
