"""The k-th largest of a stream against numpy's sort of all of it."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_moe.errors import TrainingDiverged
from lightning_moe.routing.base import target_count
from lightning_moe.routing.streamed import streamed_kth_largest

RATES = [0.3, 1e-9, 0.75, 1.0]


class Stream:
    """Batches of different sizes, and the number of readings."""

    def __init__(self, scores: Tensor) -> None:
        self.scores, self.readings = scores, 0

    def __call__(self) -> Iterator[Tensor]:
        self.readings += 1
        return iter(self.scores.split([5, 1, len(self.scores) - 6]))


def by_sorting(scores: Tensor) -> np.ndarray:
    ordered = np.sort(scores.numpy(), axis=0)[::-1]
    return np.stack([ordered[target_count(len(ordered), rate) - 1] for rate in RATES])


@pytest.mark.parametrize("memory", [2**30, 100, 0])
@pytest.mark.parametrize("kind", ["normal", "tied", "close", "signed zeros", "wide"])
def test_it_is_the_kth_of_all_rows_sorted(memory: int, kind: str) -> None:
    scores = torch.randn(4001, 3, generator=torch.Generator().manual_seed(1))
    scores = {
        "normal": scores,
        "tied": scores.round(),
        "close": 1 + scores * 1e-6,  # differ in the last digit only
        "signed zeros": torch.where(scores > 0, 0.0, -0.0),
        "wide": scores * 10 ** (10 * scores),
    }[kind]
    stream = Stream(scores)
    found = streamed_kth_largest(stream, RATES, memory)
    np.testing.assert_array_equal(found.numpy(), by_sorting(scores))
    assert stream.readings == (1 if memory == 2**30 else 3)


@pytest.mark.parametrize("memory", [2**30, 0])
def test_nan_is_refused(memory: int) -> None:
    scores = torch.randn(100, 3)
    scores[70, 1] = torch.nan
    with pytest.raises(TrainingDiverged, match="NaN"):
        streamed_kth_largest(Stream(scores), RATES, memory)


@pytest.mark.parametrize("memory", [2**30, 0])
def test_columns_may_have_rates_of_their_own_that_the_first_reading_decides(memory: int) -> None:
    scores = torch.randn(4001, 3, generator=torch.Generator().manual_seed(2))
    stream = Stream(scores)

    def rates() -> Tensor:
        assert stream.readings == 1
        return torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.1, 0.9]], dtype=torch.float64)

    found = streamed_kth_largest(stream, rates, memory)
    ordered = np.sort(scores.numpy(), axis=0)[::-1]
    for row, places in zip(found, [[0, 2000, 4000], [999, 399, 3600]], strict=True):
        assert row.tolist() == [ordered[place, column] for column, place in enumerate(places)]
