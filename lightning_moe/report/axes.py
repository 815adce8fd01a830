"""Axes that can be compared by eye: common limits, a zoom that is said, and experts in the order of their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLOSE = 0.5  # amounts of at least this part of the largest one get an axis that does not begin at 0
LEAST_SPAN = 0.02  # of the largest value: a smaller spread is not magnified any further
MARGIN = 0.06
MOST_EXPERT_LABELS = 64  # more numbers would touch


def share_limits(axes: Sequence[Axes], ruler: Literal["x", "y"], amounts: bool = True, margin: float = MARGIN) -> str:
    """Give axes the same limits, which hold everything that is drawn on them.

    Args:
        axes: axes, with something drawn on one of them at least.
        ruler: which axis.
        amounts: whether the values are amounts, to which 0 means "nothing". Their axes begin at 0 or, if all values
            are close together, are zoomed to the spread. Other axes always show the spread.
        margin: free space below and above, as a part of the span.

    Returns:
        What the label has to say of the zoom, such as " (zoomed: 0.97 to 1.02)"; empty without a zoom.
    """
    ends = [end for axis in axes for end in getattr(axis.dataLim, f"interval{ruler}").tolist() if math.isfinite(end)]
    low, high = min(ends), max(ends)
    from_zero = amounts and low >= 0
    least = LEAST_SPAN * max(abs(low), abs(high)) or 1.0
    if high - low < least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    zoomed = amounts and low > CLOSE * high > 0
    free = margin * (high - low)
    limits = (0.0 if from_zero and not zoomed else low - free, high + free)
    for axis in axes:
        axis.set(**{f"{ruler}lim": limits})
    decimals = max(0, 1 - math.floor(math.log10(limits[1] - limits[0])))
    return f" (zoomed: {limits[0]:.{decimals}f} to {limits[1]:.{decimals}f})" if zoomed else ""


def label_experts(axis: Axes, experts: Sequence[int]) -> None:
    """Number the experts on an x-axis that places them at 0, 1, …, in the order in which they are drawn."""
    step = -(-len(experts) // MOST_EXPERT_LABELS)
    axis.set_xticks(range(0, len(experts), step), [str(number) for number in experts[::step]])
    few = len(experts) <= 16
    axis.tick_params(axis="x", labelsize=7 if few else 5, labelrotation=0 if few else 90)


def text_color(background: Sequence[float]) -> str:
    """Return black or white, whichever is readable on a colour (red, green, blue, …) of numbers from 0 to 1."""
    red, green, blue = background[:3]
    return "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else "black"
