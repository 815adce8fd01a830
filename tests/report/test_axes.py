"""Axes that are compared by eye: one pair of limits, a zoom that the label says, experts in the order given."""

import pytest

from lightning_moe.report.axes import MOST_EXPERT_LABELS, label_experts, share_limits
from lightning_moe.report.figures import grid


def drawn(*series: list[float]) -> list:
    _, [axes] = grid(1, len(series), 2, 1)
    for axis, values in zip(axes, series, strict=True):
        axis.plot(values)
    return axes


def test_axes_get_the_limits_of_all_of_them() -> None:
    axes = drawn([0.2, 1.0], [0.5, 3.0], [])
    assert share_limits(axes, "y") == ""
    assert [axis.get_ylim() for axis in axes] == [pytest.approx((0, 3.0 + 0.06 * 2.8))] * 3
    assert axes[0].get_xlim() != axes[2].get_xlim()  # only what was asked for
    share_limits(axes, "x", amounts=False)
    assert len({axis.get_xlim() for axis in axes}) == 1
    assert axes[0].get_xlim() == pytest.approx((-0.06, 1.06))


def test_amounts_that_are_close_together_are_zoomed_and_the_label_says_it() -> None:
    [first, second] = drawn([0.98, 1.0], [1.0, 1.02])
    said = share_limits([first, second], "y")
    assert first.get_ylim() == second.get_ylim() == pytest.approx((0.9776, 1.0224))
    assert said == " (zoomed: 0.978 to 1.022)"


@pytest.mark.parametrize("values", [[1.0, 1.0], [1.0, 1.0 + 1e-12]])
def test_rounding_errors_are_not_magnified(values: list[float]) -> None:
    [axis] = drawn(values)
    assert share_limits([axis], "y") == " (zoomed: 0.989 to 1.011)"


def test_only_amounts_begin_at_zero() -> None:
    [axis] = drawn([5.0, 20.0])
    assert share_limits([axis], "y", amounts=False) == ""
    assert axis.get_ylim() == pytest.approx((4.1, 20.9))
    [axis] = drawn([-0.5, 0.5])
    assert share_limits([axis], "y") == ""
    assert axis.get_ylim() == pytest.approx((-0.56, 0.56))
    [axis] = drawn([0.0, 0.0])
    assert share_limits([axis], "y") == ""
    assert axis.get_ylim()[0] == 0 < axis.get_ylim()[1]


def test_error_bars_and_boxes_are_inside() -> None:
    [axis] = drawn([])
    axis.errorbar([0, 1], [1.0, 1.0], [0.1, 0.3])
    assert share_limits([axis], "y") != ""
    assert axis.get_ylim() == pytest.approx((0.7 - 0.036, 1.3 + 0.036))


def test_experts_keep_their_numbers() -> None:
    [axis] = drawn([1.0, 2.0])
    label_experts(axis, [2, 0, 1])
    assert [text.get_text() for text in axis.get_xticklabels()] == ["2", "0", "1"]
    assert axis.get_xticks().tolist() == [0, 1, 2]
    label_experts(axis, list(range(2 * MOST_EXPERT_LABELS))[::-1])
    assert [text.get_text() for text in axis.get_xticklabels()][:3] == ["127", "125", "123"]
    assert len(axis.get_xticks()) == MOST_EXPERT_LABELS
