"""Training windows from a streamed data set, encoded and packed while it is read, with exact resume."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from lightning_moe.data.delivery import Batch, Delivery
from lightning_moe.data.hub_dataset import HubDataset
from lightning_moe.data.split import split_of
from lightning_moe.data.tokenizer import Tokenizer
from lightning_moe.data.windows import Layout
from lightning_moe.errors import UserError

DOCUMENTS_AT_ONCE = 32


class PackedStream:
    """The training documents of a stream as one endless row of tokens, pass after pass.

    `state_dict` gives the exact position: that of the data set, and the tokens that are encoded but not yet used.
    """

    def __init__(
        self, corpus: HubDataset, tokenizer: Tokenizer, validation_fraction: float, state: dict[str, Any] | None = None
    ) -> None:
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.validation_fraction = validation_fraction
        self.buffer = np.empty(0, np.int32)
        if state is None:
            self._open(None)
        else:
            self.load_state_dict(state)

    def take(self, count: int, sequence_length: int) -> np.ndarray:
        """Return the next windows, int32 [count, sequence_length + 1]; one ends with the first token of the next."""
        needed = count * sequence_length + 1
        parts = [self.buffer]
        while sum(len(part) for part in parts) < needed:
            parts.append(self._encode_more())
        tokens = np.concatenate(parts)
        self.buffer = tokens[needed - 1 :]
        starts = np.arange(count)[:, None] * sequence_length
        windows: np.ndarray = tokens[starts + np.arange(sequence_length + 1)]
        return windows

    def state_dict(self) -> dict[str, Any]:
        return {"dataset": self._place, "buffer": torch.from_numpy(self.buffer.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer = state["buffer"].numpy()
        self._open(state["dataset"])

    def _open(self, state: dict[str, Any] | None) -> None:
        self.dataset = self.corpus.load()
        if state is not None:
            self.dataset.load_state_dict(state)
        # Kept, because `datasets` gives a wrong state between load_state_dict and the first row.
        self._place = self.dataset.state_dict() if state is None else state
        self._found_text = state is not None  # in this pass
        self.rows = self.corpus.rows(self.dataset)

    def _encode_more(self) -> np.ndarray:
        rows = list(itertools.islice(self.rows, DOCUMENTS_AT_ONCE))
        if not rows:  # the end of a pass
            if not self._found_text:
                raise UserError(f"data.corpus: {self.corpus.name!r} has no text for training, only held-out documents.")
            self._open(None)
            rows = list(itertools.islice(self.rows, DOCUMENTS_AT_ONCE))
        self._place = self.dataset.state_dict()
        texts = [text for row in rows if (text := self.corpus.text_of(row))]
        texts = [text for text in texts if split_of(text, self.validation_fraction) == "train"]
        self._found_text |= bool(texts)
        ids = ([self.tokenizer.end_of_text_id, *ids] for ids in self.tokenizer.encode_batch(texts))
        return np.fromiter(itertools.chain.from_iterable(ids), np.int32)


class StreamingLoader:
    """This rank's micro-batches of a stream, one optimizer step after the other.

    Every rank encodes the whole stream and keeps its slices. This needs no communication, and the order does not depend
    on the number of ranks, but it is no faster than one rank encodes. The loader runs in the training process, so that
    the state after a step is that of the data that the step has used.
    """

    def __init__(
        self,
        stream: PackedStream,
        sequence_length: int,
        layout: Layout,
        position: Callable[[], int],
        length: int,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
    ) -> None:
        self.stream = stream
        self.sequence_length = sequence_length
        self.layout = layout
        self.position = position
        # By position: the stream's states at the start and the end of the present step.
        self._snapshots = {position(): stream.state_dict()}
        self._length = length
        self._delivery = Delivery(device, ahead=False)  # the stream's state is that of the step in use

    @property
    def seconds_waited(self) -> float:
        """Seconds that whoever took the batches has waited for them so far."""
        return self._delivery.seconds_waited

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        return self._delivery.deliver(self._batches())

    def _batches(self) -> Iterator[Batch]:
        size = self.layout.global_batch_size
        position = self.position()
        self.stream.load_state_dict(self._snapshots[position])
        while True:
            start = self._snapshots[position]
            windows = torch.from_numpy(self.stream.take(size, self.sequence_length)).long()
            self._snapshots = {position: start, position + size: self.stream.state_dict()}
            for indices in self.layout.slices(np.arange(size)):
                rows = windows[indices]
                yield {"input_ids": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}
            position += size

    def snapshot(self) -> dict[str, Any]:
        """Return the state of the stream at `position()`."""
        return self._snapshots[self.position()]

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state, as in `WindowLoader`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
