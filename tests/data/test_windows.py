"""Which window goes to which rank and micro-batch, and what is in it."""

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.data.sharded_tokens import ShardedTokens
from lightning_moe.data.windows import (
    EvaluationSampler,
    Layout,
    TokenWindows,
    TrainingOrder,
    TrainingSampler,
    WindowLoader,
)
from lightning_moe.errors import UserError

small = st.integers(1, 6)


@given(st.integers(1, 50), st.integers(0, 2**63), st.integers(0, 200), st.integers(0, 60))
def test_order_is_one_permutation_after_the_other(windows: int, seed: int, start: int, count: int) -> None:
    order = TrainingOrder(windows, seed)
    everything = np.concatenate([order.windows(e * windows, (e + 1) * windows) for e in range(260 // windows + 1)])
    for epoch in range(3):
        assert sorted(everything[epoch * windows : (epoch + 1) * windows]) == list(range(windows))
    if count:
        assert TrainingOrder(windows, seed).windows(start, start + count).tolist() == list(everything[start:][:count])


def test_order_never_changes() -> None:
    """Checkpoints are resumed under other versions and on other machines."""
    first_25 = [9, 2, 4, 7, 5, 0, 8, 6, 3, 1, 5, 6, 3, 0, 7, 2, 1, 4, 9, 8, 5, 6, 9, 3, 2]
    assert TrainingOrder(10, seed=1).windows(0, 25).tolist() == first_25
    assert TrainingOrder(10, seed=2).windows(0, 25).tolist() != first_25


def test_order_is_uniform() -> None:
    firsts = np.bincount([int(TrainingOrder(4, seed).windows(0, 1)[0]) for seed in range(4000)], minlength=4)
    assert abs(firsts - 1000).max() < 110  # 4 standard deviations


@given(small, small, small, st.integers(0, 1000))
def test_ranks_and_micro_batches_share_out_each_step(world: int, accumulate: int, micro: int, position: int) -> None:
    size = world * accumulate * micro
    order = TrainingOrder(max(size, 50), seed=3)
    ranks = [
        iter(TrainingSampler(order, Layout(size, accumulate, world, rank), lambda: position)) for rank in range(world)
    ]
    for step in range(3):
        batches = [next(rank) for _ in range(accumulate) for rank in ranks]
        assert {len(batch) for batch in batches} == {micro}
        # read micro-batch by micro-batch and rank by rank, a step is the global order itself
        start = position + step * size
        assert list(itertools.chain(*batches)) == order.windows(start, start + size).tolist()


def test_batch_size_that_does_not_divide() -> None:
    with pytest.raises(UserError, match=r"global_batch_size=12 .* 2 ranks × 4 .* multiple of 8"):
        Layout(12, accumulate_grad_batches=4, world_size=2)
    with pytest.raises(UserError, match="4 ranks"):  # more ranks than sequences
        Layout(2, world_size=4)


@given(st.integers(1, 60), st.integers(1, 9), small)
def test_evaluation_covers_every_window_once(windows: int, batch: int, world: int) -> None:
    ranks = [EvaluationSampler(windows, batch, world, rank) for rank in range(world)]
    assert sorted(i for rank in ranks for b in rank for i in b if i >= 0) == list(range(windows))
    assert len({len(rank) for rank in ranks}) == 1
    assert len({tuple(len(b) for b in rank) for rank in ranks}) == 1
    assert all(len(list(rank)) == len(rank) for rank in ranks)
    assert sum(i < 0 for rank in ranks for b in rank for i in b) < world


@given(st.lists(st.integers(0, 2**16 - 1), min_size=2, max_size=70), st.integers(1, 9))
def test_windows_against_a_loop(tmp_path_factory: pytest.TempPathFactory, tokens: list[int], length: int) -> None:
    path = tmp_path_factory.mktemp("w") / "t.tokens"
    np.array(tokens, "<u2").tofile(path)
    windows = TokenWindows(ShardedTokens([path], [len(tokens)], "<u2"), length)
    batch = windows[list(range(len(windows)))]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"].shape == batch["labels"].shape == (len(windows), length)
    scored = []
    for inputs, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        for value, label in zip(inputs, labels, strict=True):
            if label == -100:
                assert value in (0, tokens[-1])
            else:
                assert value == tokens[len(scored)]
                scored.append(label)
    assert scored == tokens[1:]  # every token but the very first is a label exactly once
    assert windows.num_full == (len(tokens) - 1) // length


@given(st.lists(st.lists(st.integers(0, 999), max_size=9), min_size=1, max_size=6), st.data())
def test_several_files_are_read_as_one_row(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[int]], data: st.DataObject
) -> None:
    """Any span, also over whole files and empty ones; and windows cross from one file to the next."""
    folder = tmp_path_factory.mktemp("w")
    paths = [folder / f"{i}.tokens" for i in range(len(files))]
    for path, ids in zip(paths, files, strict=True):
        np.array(ids, "<u2").tofile(path)
    row = [i for ids in files for i in ids]
    tokens = ShardedTokens(paths, [len(ids) for ids in files], "<u2")
    assert (len(tokens), tokens.tolist()) == (len(row), row)
    start, stop = data.draw(st.integers(0, len(row))), data.draw(st.integers(0, len(row) + 3))
    assert tokens[start:stop].tolist() == row[start:stop]
    assert pickle.loads(pickle.dumps(tokens))[start:].tolist() == row[start:]
    windows = TokenWindows(tokens, 2)
    whole = [windows[[i]]["labels"][0].tolist() for i in range(windows.num_full)]
    assert whole == [row[2 * i + 1 : 2 * i + 3] for i in range(windows.num_full)]


def test_padding_window_and_large_ids(tmp_path: Path) -> None:
    np.array([0, 70_000, 2], "<u4").tofile(tmp_path / "t.tokens")
    batch = TokenWindows(ShardedTokens([tmp_path / "t.tokens"], [3], "<u4"), 2)[[-1, 0]]
    assert batch["input_ids"].tolist() == [[0, 0], [0, 70_000]]
    assert batch["labels"].tolist() == [[-100, -100], [70_000, 2]]


def test_no_tokens_no_windows(tmp_path: Path) -> None:
    (tmp_path / "t.tokens").touch()
    assert len(TokenWindows(ShardedTokens([tmp_path / "t.tokens"], [0], "<u2"), 4)) == 0


def test_loading_draws_nothing_from_the_global_generator(tmp_path: Path) -> None:
    """A run that resumes opens its loader once more: its random numbers must be the same."""
    np.arange(100, dtype="<u2").tofile(tmp_path / "t.tokens")
    windows = TokenWindows(ShardedTokens([tmp_path / "t.tokens"], [100], "<u2"), 4)
    before = torch.get_rng_state()
    assert len(list(WindowLoader(windows, EvaluationSampler(24, 8), 3, 0))) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_get_the_file_and_not_a_copy(tmp_path: Path) -> None:
    np.zeros(100_000, "<u2").tofile(tmp_path / "t.tokens")
    windows = TokenWindows(ShardedTokens([tmp_path / "t.tokens"], [100000], "<u2"), 4)
    expected = windows[[3, 5]]
    pickled = pickle.dumps(windows)
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled)[[3, 5]]["labels"], expected["labels"])


def test_worker_processes_give_the_same_batches(tmp_path: Path) -> None:
    np.arange(100, dtype="<u2").tofile(tmp_path / "t.tokens")
    windows = TokenWindows(ShardedTokens([tmp_path / "t.tokens"], [100], "<u2"), 4)
    alone = list(WindowLoader(windows, EvaluationSampler(24, 8), 3, num_workers=0))
    loader = WindowLoader(windows, EvaluationSampler(24, 8), 3, num_workers=2)
    for _ in range(2):  # the processes stay from one pass to the next
        for batch, reference in zip(loader, alone, strict=True):
            assert torch.equal(batch["labels"], reference["labels"])
