"""One style for all figures, and their PNG files.

Colour-blind readers can tell the colours apart, and canvases need no display. The functions that draw import
Matplotlib, so that commands which draw nothing start without it.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

#: Okabe and Ito's palette, with the wine red of Paul Tol's instead of the yellow, which is too light on white
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#882255")
DASHES = ("-", (0, (5, 2)), (0, (5, 1.5, 1, 1.5)), (0, (2, 1)), (0, (8, 3)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "0.45"
MOST_LEGEND_ENTRIES = 8
RESOLUTION = 150  # dots per inch of a PNG
MARGIN = 0.4  # inches beside the axes


def grid(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[list[Axes]]]:
    """Make a figure with ``rows`` × ``columns`` axes of ``width`` × ``height`` inches each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns + MARGIN, height * rows + MARGIN), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, axes.tolist()


def panel_grid(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Make a figure with ``count`` axes of ``width`` × ``height`` inches, at most ``columns`` in a row."""
    columns = min(columns, count)
    figure, rows = grid(-(-count // columns), columns, width, height)
    axes = [axis for row in rows for axis in row]
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def png(figure: Figure, as_it_is: bool = False) -> bytes:
    """Draw a figure as a PNG.

    Args:
        figure: figure to draw.
        as_it_is: whether to keep its size and text sizes; otherwise it gets the common ones, and nothing is cut off.
    """
    if not as_it_is:
        tidy(figure)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=RESOLUTION, bbox_inches=None if as_it_is else "tight")
    return image.getvalue()


def tidy(figure: Figure) -> None:
    """Give titles, labels and ticks the text sizes of all figures."""
    for axis in figure.axes:
        for location in ("left", "center"):
            axis.set_title(axis.get_title(loc=location), loc=location, fontsize=10)
        for ruler in (axis.xaxis, axis.yaxis):
            ruler.label.set_fontsize(9)
            ruler.offsetText.set_fontsize(8)
            for text in ruler.get_ticklabels():
                text.set_fontsize(min(8, text.get_fontsize()))


def line_style(index: int) -> dict[str, Any]:
    """Return colour and dashes of the ``index``-th line; both change, so that lines on top of each other all show."""
    return {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[index % len(DASHES)]}


def layer_colors(count: int) -> list[Any]:
    """Return a colour for each layer, from dark (bottom) to light (top)."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * index / max(1, count - 1)) for index in range(count)]


def layer_legend(axis: Axes, names: Sequence[str], colors: Sequence[Any], further: Sequence[tuple[str, Any]]) -> None:
    """Draw a legend right of the axes, which names only some of many layers."""
    from matplotlib.lines import Line2D

    step = -(-len(names) // MOST_LEGEND_ENTRIES)
    entries = [(name, {"color": color}) for name, color in list(zip(names, colors, strict=True))[::step]]
    handles = [Line2D([], [], label=label, **style) for label, style in [*further, *entries]]
    axis.legend(handles=handles, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def shared_legend(figure: Figure, right: bool = False, below: bool = False) -> None:
    """Draw one legend for all axes of a figure, each label once: above them, on their right, or below them.

    A figure with a title of its own has no room above.
    """
    entries = {
        text: handle for axis in figure.axes for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        entries.values(), entries.keys(),
        loc="outside right center" if right else "outside lower center" if below else "outside upper left",
        ncols=1 if right else 4, fontsize=8, frameon=False,
    )  # fmt: skip


def layer_ticks(ruler: Axis, layers: Sequence[str], most: int, first: int = 0) -> None:
    """Number the layers on an axis that places them at ``first``, ``first`` + 1, …; at most ``most`` of them."""
    step = -(-len(layers) // most)
    numbers = [name.removeprefix("layer_") for name in layers]
    ruler.set_ticks(range(first, first + len(layers), step), numbers[::step])


def wrapped(label: str, width: int = 34) -> str:
    """Break a long label into several lines."""
    return textwrap.fill(label, width)


def wrapped_key(key: str, width: int) -> str:
    """Break a long name into lines after its dots, slashes and spaces, and after underscores where that is not enough.

    Args:
        key: name, such as a configuration's key.
        width: characters of a line. A part without any of these characters stays whole, even if it is longer.
    """
    lines = [""]
    for part in re.findall(r"[^./ ]+[./ ]?|[./ ]", key):
        for piece in re.findall(r"[^_]+_*|_+", part) if len(part.rstrip()) > width else [part]:
            if lines[-1] and len(f"{lines[-1]}{piece}".rstrip()) > width:
                lines.append("")
            lines[-1] += piece
    return "\n".join(line.rstrip(" ") for line in lines)
