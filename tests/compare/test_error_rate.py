"""How often an interval excludes 0 where two methods do not differ: what docs/study.md says, by simulation.

The unit is the standard deviation of one run. Both methods have the same mean loss at each of four tuned values.
"""

import random

import pytest

from lightning_moe.compare.statistics import paired_difference

COMPARISONS = 3000  # the standard error of a share of 16% is 0.7%


def excluding(second_best: float, num_seeds: int, tuned: bool) -> float:
    """The share of comparisons whose interval excludes 0; untuned methods both have the best value."""
    draw, losses, count = random.Random(0), (3.0, 0.0, second_best, 5.0), 0
    for _ in range(COMPARISONS):
        values = []
        for _ in range(2):
            loss = min((loss + draw.gauss(), loss) for loss in losses)[1] if tuned else 0.0
            values.append({seed: loss + draw.gauss() for seed in range(num_seeds)})
        difference = paired_difference(*values)
        assert difference is not None
        count += difference.excludes_zero is True
    return count / COMPARISONS


def test_an_interval_errs_once_in_twenty_if_nothing_was_tuned() -> None:
    assert excluding(1.5, 5, tuned=False) == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize(("num_seeds", "share"), [(3, 0.093), (5, 0.160), (10, 0.260)])
def test_tuning_with_one_run_per_value_makes_it_err_more_often(num_seeds: int, share: float) -> None:
    """The more seeds judge it, the surer is the difference between values that chance has chosen."""
    second_best = 1.0 if num_seeds == 10 else 1.5
    assert excluding(second_best, num_seeds, tuned=True) == pytest.approx(share, abs=0.025)
