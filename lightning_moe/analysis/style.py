"""How the figures look: colours that colour-blind readers tell apart, and canvases without a display."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's palette; instead of the yellow (too light on white) the wine red of Paul Tol's
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#882255")
DASHES = ("-", (0, (5, 2)), (0, (5, 1.5, 1, 1.5)), (0, (2, 1)), (0, (8, 3)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "0.45"
MOST_LEGEND_ENTRIES = 8


def grid(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[list[Axes]]]:
    """A figure with ``rows`` × ``columns`` axes of ``width`` × ``height`` inches each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns + 0.4, height * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, axes.tolist()


def tidy(figure: Figure) -> None:
    """One set of text sizes for all figures."""
    for axis in figure.axes:
        for location in ("left", "center"):
            axis.set_title(axis.get_title(loc=location), loc=location, fontsize=10)
        for ruler in (axis.xaxis, axis.yaxis):
            ruler.label.set_fontsize(9)
            for text in ruler.get_ticklabels():
                text.set_fontsize(min(8, text.get_fontsize()))


def line_style(index: int) -> dict[str, Any]:
    """Colour and dashes of the ``index``-th line: both change with it, so that lines on top of each other all show."""
    return {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[index % len(DASHES)]}


def layer_colors(count: int) -> list[Any]:
    """Dark (bottom layer) to light (top layer)."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * index / max(1, count - 1)) for index in range(count)]


def layer_legend(axis: Axes, names: Sequence[str], colors: Sequence[Any], further: Sequence[tuple[str, Any]]) -> None:
    """A legend right of the axes; of many layers it names some."""
    from matplotlib.lines import Line2D

    step = -(-len(names) // MOST_LEGEND_ENTRIES)
    entries = [(name, {"color": color}) for name, color in list(zip(names, colors, strict=True))[::step]]
    handles = [Line2D([], [], label=label, **style) for label, style in [*further, *entries]]
    axis.legend(handles=handles, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def expert_ticks(axis: Axes, count: int) -> None:
    """Numbers of experts on the x-axis, thinned so that they do not touch."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128) if count / step <= 12)
    axis.set_xticks(range(0, count, step), [str(number) for number in range(0, count, step)])


def wrapped(label: str, width: int = 34) -> str:
    """A long label in several lines."""
    return textwrap.fill(label, width)
