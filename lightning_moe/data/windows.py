"""Batches of token windows, and which window goes where for any number of ranks and accumulation steps."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_moe.data.delivery import Batch, Delivery
from lightning_moe.data.domains import TokenDomains
from lightning_moe.data.sharded_tokens import ShardedTokens
from lightning_moe.errors import UserError

IGNORED = -100
"""Label of a position that does not count."""
PADDING = -1
"""Index of the window that is nothing but padding."""


@dataclass(frozen=True)
class Layout:
    """How the samples of one optimizer step are divided over ranks and accumulation steps.

    Raises:
        UserError: `global_batch_size` is not a multiple of ranks × accumulation steps.
    """

    global_batch_size: int
    accumulate_grad_batches: int = 1
    world_size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.global_batch_size % (self.world_size * self.accumulate_grad_batches):
            raise UserError(
                f"data.global_batch_size={self.global_batch_size} sequences cannot be divided over {self.world_size} "
                f"ranks × {self.accumulate_grad_batches} accumulation steps (trainer.accumulate_grad_batches): it has "
                f"to be a multiple of {self.world_size * self.accumulate_grad_batches}."
            )

    def slices(self, step: np.ndarray) -> list[list[int]]:
        """Return this rank's micro-batches of one step, from the step's samples [global_batch_size] in global order."""
        micro_batches = step.reshape(self.accumulate_grad_batches, self.world_size, -1)
        return [indices.tolist() for indices in micro_batches[:, self.rank]]


class TrainingOrder:
    """The endless sequence of training windows: one random permutation after the other.

    Sample `i` is entry `i % num_windows` of permutation `i // num_windows`. It depends on the seed and the number of
    windows only, not on batch size, ranks or accumulation.
    """

    def __init__(self, num_windows: int, seed: int) -> None:
        self.num_windows = num_windows
        self.seed = seed
        self._permutation: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def windows(self, start: int, stop: int) -> np.ndarray:
        """Return the window indices of the samples from `start` to `stop`, int64 [stop − start]."""
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.num_windows)
            count = min(stop - start, self.num_windows - offset)
            parts.append(self._epoch(epoch)[offset : offset + count])
            start += count
        return np.concatenate(parts)

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._permutation[0] != epoch:
            # We sort raw 64-bit draws, because NumPy promises only for its bit generators that they never change.
            draws = np.random.PCG64(np.random.SeedSequence((self.seed, epoch))).random_raw(self.num_windows)
            self._permutation = (epoch, np.argsort(draws, kind="stable"))
        return self._permutation[1]


class TrainingSampler:
    """Endless index lists of this rank's micro-batches, from `position()` (in samples of all ranks) on.

    Each `iter()` asks for the position, when nothing has been fetched in advance. So it does not matter how far workers
    run ahead afterwards.
    """

    def __init__(self, order: TrainingOrder, layout: Layout, position: Callable[[], int]) -> None:
        self.order = order
        self.layout = layout
        self.position = position

    def __iter__(self) -> Iterator[list[int]]:
        return self._from(self.position())

    def _from(self, position: int) -> Iterator[list[int]]:
        size = self.layout.global_batch_size
        for start in itertools.count(position, size):
            yield from self.layout.slices(self.order.windows(start, start + size))


class EvaluationSampler:
    """Index lists that cover all windows once over all ranks; each rank has as many lists and as many windows.

    At most the last `world_size − 1` windows are padding.
    """

    def __init__(self, num_windows: int, batch_size: int, world_size: int = 1, rank: int = 0) -> None:
        per_rank = -(-num_windows // world_size)
        mine = range(rank, per_rank * world_size, world_size)
        self.windows = [i if i < num_windows else PADDING for i in mine]
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.windows) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.windows), self.batch_size):
            yield self.windows[start : start + self.batch_size]


class TokenWindows(Dataset[Batch]):
    """Non-overlapping windows of a row of tokens: window `i` predicts tokens `i·S + 1 … i·S + S`.

    A list of window indices as index gives a batch: `input_ids` and `labels`, int64 [len(indices), S]. The end of the
    last window and all of window `PADDING` have label −100 (and input 0). Borders of shards mean nothing.

    Args:
        tokens: The row of tokens.
        sequence_length: Tokens S in a window.
        domains: Domains of the tokens. With them a batch also has `domains`, int64 [len(indices), S]: the number of the
            label's domain, and −100 where the label is −100.
    """

    def __init__(self, tokens: ShardedTokens, sequence_length: int, domains: TokenDomains | None = None) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.domains = domains

    @property
    def num_full(self) -> int:
        """Windows without padding."""
        return max(0, len(self.tokens) - 1) // self.sequence_length

    def __len__(self) -> int:
        return -(-max(0, len(self.tokens) - 1) // self.sequence_length)

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        rows = np.full((len(indices), self.sequence_length + 1), IGNORED, np.int64)
        domains = np.full((len(indices), self.sequence_length), IGNORED, np.int64)
        for row, of_labels, index in zip(rows, domains, indices, strict=True):
            if index != PADDING:
                start = index * self.sequence_length
                tokens = self.tokens[start : start + self.sequence_length + 1]
                row[: len(tokens)] = tokens
                if self.domains is not None:
                    of_labels[: len(tokens) - 1] = self.domains.of(start + 1, start + len(tokens))
        windows = torch.from_numpy(rows)
        batch = {"input_ids": windows[:, :-1].clamp(min=0), "labels": windows[:, 1:].contiguous()}
        return batch if self.domains is None else batch | {"domains": torch.from_numpy(domains)}


class WindowLoader:
    """A `DataLoader` of whole batches, with a given length.

    It is not itself a `DataLoader`, so that Lightning takes its batches as they are: the sampler is already divided
    over the ranks. Its (empty) state tells Lightning that it can resume in the middle of an epoch. The DataModule keeps
    the position.

    Args:
        windows: Dataset of windows.
        sampler: Lists of window indices, one for each batch.
        length: Number of batches, as Lightning shall count them.
        num_workers: Number of processes that read windows; 0 reads them in this one.
        device: Device that the batches will go to, see `Delivery`.
    """

    def __init__(
        self,
        windows: TokenWindows,
        sampler: Iterable[list[int]],
        length: int,
        num_workers: int,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
    ) -> None:
        #: domains that the numbers in the batches' `domains` mean; empty if the batches have none
        self.domain_names = () if windows.domains is None else windows.domains.names
        self._length = length
        self._delivery = Delivery(device, ahead=num_workers == 0)  # worker processes are ahead anyway
        self._loader: DataLoader[Batch] = DataLoader(
            windows,
            sampler=sampler,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # otherwise each iter() draws from the global one, and resuming would differ
        )

    def __len__(self) -> int:
        return self._length

    @property
    def seconds_waited(self) -> float:
        """Seconds that whoever took the batches has waited for them so far."""
        return self._delivery.seconds_waited

    def __iter__(self) -> Iterator[Batch]:
        return self._delivery.deliver(self._loader)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
