"""The exact k-th largest and the exact top-k, against sorting; one process and two."""

import numpy as np
import pytest
import torch
from helpers.gloo_pair import GlooPair
from helpers.reading import numbers_read
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_moe.errors import TrainingDiverged
from lightning_moe.routing.base import target_count
from lightning_moe.routing.pooling import pooled_kth_largest, top_count_mask
from lightning_moe.waits import as_if_reading_waited

ADVERSARIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, 1e-45, -1e-45, 1.1754944e-38, -1.1754944e-38, 3.4028235e38,
               -3.4028235e38, 1.0000001, 0.99999994]  # fmt: skip

float32 = st.floats(width=32, allow_nan=False)
value = st.one_of(st.sampled_from(ADVERSARIAL), float32)


@st.composite
def pools(draw: st.DrawFn, min_rows: int = 1) -> np.ndarray:
    """fp32 [N, C] of a few distinct values, so that ties are common; C = 1 or 2."""
    rows, columns = draw(st.integers(min_rows, 24)), draw(st.integers(1, 2))
    distinct = np.array(draw(st.lists(value, min_size=1, max_size=12)), dtype=np.float32)
    picks = draw(st.binary(min_size=rows * columns, max_size=rows * columns))
    return distinct[np.frombuffer(picks, np.uint8) % len(distinct)].reshape(rows, columns)


def kth_by_sorting(pool: np.ndarray, k: int) -> np.ndarray:
    return np.sort(pool + np.float32(0.0), axis=0)[::-1][k - 1]  # the sum turns -0.0 into 0.0


def assert_same_bits(actual: Tensor, expected: np.ndarray) -> None:
    assert actual.dtype == torch.float32
    np.testing.assert_array_equal(actual.numpy().view(np.int32), expected.view(np.int32))


def rate_of(k: int, num_tokens: int) -> float:
    rate = k / num_tokens
    assert target_count(num_tokens, rate) == k
    return rate


@pytest.mark.parametrize(
    ("num_tokens", "rate", "k"),
    [(64, 1 / 16, 4), (24, 1 / 16, 2), (23, 1 / 16, 1), (8, 1 / 16, 1), (1, 1 / 16, 1), (10, 1.0, 10), (10, 0.25, 3)],
)
def test_target_count_rounds_half_up_within_one_and_the_pool(num_tokens: int, rate: float, k: int) -> None:
    assert target_count(num_tokens, rate) == k


@given(pools(), st.data())
def test_kth_largest_of_one_process_is_the_sorted_one(pool: np.ndarray, data: st.DataObject) -> None:
    k = data.draw(st.one_of(st.just(1), st.just(len(pool)), st.integers(1, len(pool))))
    [[cutoff]] = pooled_kth_largest([torch.from_numpy(pool)], [[rate_of(k, len(pool))]])
    assert_same_bits(cutoff, kth_by_sorting(pool, k))


@given(pools(min_rows=2), pools(min_rows=2), st.data())
def test_kth_largest_of_two_processes_is_the_sorted_one(
    gloo_pair: GlooPair, first: np.ndarray, second: np.ndarray, data: st.DataObject
) -> None:
    """Two layers with their own rates, split unevenly over the ranks: the bits are those of sorting the whole pool."""
    rows = min(len(first), len(second))
    layers = [first[:rows], second[:rows]]
    split = data.draw(st.integers(1, rows - 1))
    one_k = st.one_of(st.just(1), st.just(rows), st.integers(1, rows))
    ks = [data.draw(st.lists(one_k, min_size=1, max_size=3)) for _ in layers]
    rates = [[rate_of(k, rows) for k in of_layer] for of_layer in ks]
    parts = [[torch.from_numpy(layer[part]) for layer in layers] for part in (slice(split), slice(split, None))]
    for cutoffs in gloo_pair.run(pooled_kth_largest, [(part, rates) for part in parts]):
        for cutoff, layer, of_layer in zip(cutoffs, layers, ks, strict=True):
            assert cutoff.shape == (len(of_layer), layer.shape[1])
            for row, k in zip(cutoff, of_layer, strict=True):
                assert_same_bits(row, kth_by_sorting(layer, k))


def test_two_processes_give_the_bits_of_one_on_many_random_logits(gloo_pair: GlooPair) -> None:
    logits = [torch.randn(999, 8), torch.randn(999, 5).bfloat16().float()]  # the second full of ties
    rates = [[1 / 16, 1 / 2, 1 / 32], [0.3]]
    whole = pooled_kth_largest(logits, rates)
    assert_same_bits(whole[0][1], kth_by_sorting(logits[0].numpy(), 500))
    parts = [[layer[:123] for layer in logits], [layer[123:] for layer in logits]]
    for cutoffs in gloo_pair.run(pooled_kth_largest, [(part, rates) for part in parts]):
        for cutoff, expected in zip(cutoffs, whole, strict=True):
            assert_same_bits(cutoff, expected.numpy())


def refusal(chunks: list[Tensor]) -> str:
    with pytest.raises(TrainingDiverged) as caught:
        pooled_kth_largest(chunks, [[0.5]] * len(chunks))
    return str(caught.value)


def test_nan_is_refused_on_every_rank(gloo_pair: GlooPair) -> None:
    """Only the second rank holds it; the first would wait for ever if it did not hear of it."""
    good, bad = torch.randn(5, 3), torch.randn(5, 3)
    bad[4, 2] = bad[1, 2] = torch.nan
    expected = "2 router scores of expert 2 in MoE layer 1 (counted from 0) are NaN"
    assert refusal([good, bad]).startswith(expected)
    for message in gloo_pair.run(refusal, [([good, good],), ([good, bad],)]):
        assert message.startswith(expected)


def collectives_of_kth_largest(chunks: list[Tensor], rates: list[float]) -> list[int]:
    """Sizes of the tensors that were all-reduced."""
    import torch.distributed as dist

    sizes, all_reduce = [], dist.all_reduce

    def counted(tensor: Tensor, *args: object, **kwargs: object) -> object:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        pooled_kth_largest(chunks, [rates] * len(chunks))
    finally:
        dist.all_reduce = all_reduce
    return sizes


@pytest.mark.parametrize("rates", [[0.5], [0.1, 0.5, 0.9]])
def test_communication_does_not_grow_with_the_tokens(gloo_pair: GlooPair, rates: list[float]) -> None:
    sizes = [
        gloo_pair.run(collectives_of_kth_largest, [([torch.randn(tokens, 4)] * 3, rates)] * 2)[0]
        for tokens in (10, 5000)
    ]
    assert sizes[0] == sizes[1]
    assert len(sizes[0]) == 4  # whatever the number of layers and rates


def top_by_sorting(column: np.ndarray, count: int) -> np.ndarray:
    """The largest ones; of equal ones the earlier."""
    mask = np.zeros(len(column), dtype=bool)
    for token in sorted(range(len(column)), key=lambda t: (-column[t], t))[:count]:
        mask[token] = True
    return mask


@given(pools(), st.data())
def test_top_count_mask_marks_what_sorting_would(pool: np.ndarray, data: st.DataObject) -> None:
    rows, columns = pool.shape
    counts = data.draw(st.lists(st.integers(0, rows), min_size=columns, max_size=columns))
    bound = data.draw(st.integers(max(1, *counts), rows))
    expected = np.stack([top_by_sorting(pool[:, i], counts[i]) for i in range(columns)], axis=1)
    scores = torch.from_numpy(pool)
    np.testing.assert_array_equal(top_count_mask(scores, torch.tensor(counts), bound).numpy(), expected)
    for i, count in enumerate(counts):  # the form with one count for all columns
        if count:
            column = top_count_mask(scores[:, i : i + 1], count, bound)
            np.testing.assert_array_equal(column[:, 0].numpy(), expected[:, i])


def test_of_equal_scores_the_earlier_token_wins() -> None:
    mask = top_count_mask(torch.tensor([[1.0], [2.0], [1.0], [1.0]]), 2, 2)
    assert mask[:, 0].tolist() == [True, True, False, False]


def test_pools_in_front_are_independent() -> None:
    scores = torch.randn(3, 7, 2)
    together = top_count_mask(scores, 3, 3)
    assert torch.equal(together, torch.stack([top_count_mask(pool, 3, 3) for pool in scores]))


def without_reading(chunks: list[Tensor], rates: list[list[float]], offsets: list[int]) -> list[Tensor]:
    """`pooled_kth_largest` as on a GPU, where reading a number would be a wait; no number is read."""
    with as_if_reading_waited():
        pooled_kth_largest(chunks, rates, offsets)  # the first call sends constants to the device
        with numbers_read() as found:
            cutoffs = pooled_kth_largest(chunks, rates, offsets)
    assert found == []
    return cutoffs


def test_without_reading_a_number_the_bits_are_the_same(gloo_pair: GlooPair) -> None:
    chunks = [torch.randn(50, 3), torch.randn(50, 2).bfloat16().float(), torch.zeros(50, 1).neg()]
    rates, offsets = [[0.1, 0.5, 1.0], [0.3], [0.02, 0.9]], [0, 1, 0]
    expected = pooled_kth_largest(chunks, rates, offsets)
    halves = [[chunk[part] for chunk in chunks] for part in (slice(20), slice(20, None))]
    both = gloo_pair.run(without_reading, [(half, rates, offsets) for half in halves])
    for found in (without_reading(chunks, rates, offsets), *both):
        for cutoff, exact in zip(found, expected, strict=True):
            assert_same_bits(cutoff, exact.numpy())


def test_without_reading_a_column_with_nan_gives_nan_alone(gloo_pair: GlooPair) -> None:
    good, bad = torch.randn(10, 3), torch.randn(10, 3)
    bad[4, 2] = torch.nan
    rates = [[0.2, 0.5]] * 2
    expected = pooled_kth_largest([good, bad[:, :2]], rates)
    halves = [[chunk[part] for chunk in (good, bad)] for part in (slice(5), slice(5, None))]
    both = gloo_pair.run(without_reading, [(half, rates, [0, 0]) for half in halves])
    for of_good, of_bad in (without_reading([good, bad], rates, [0, 0]), *both):
        assert_same_bits(of_good, expected[0].numpy())
        assert_same_bits(of_bad[:, :2].contiguous(), expected[1].numpy())
        assert of_bad[:, 2].isnan().all()
