"""Figures of a run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_moe.report.figures import grid, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HIGHEST_SHOWN = 2.0  # the colour scale is symmetric about 1 and ends here; a cell above it carries its number


def load_figure(
    load: Tensor, layers: Sequence[int | str] | None = None, title: str = "Load per layer and expert"
) -> "Figure":
    """Draw a heat map of each expert's share of its layer's tokens, relative to the mean over the layer's experts.

    1 is a balanced expert. Blue is below and red is above (a pair that colour-blind readers can distinguish). An expert
    without tokens is marked ×, one above twice the mean carries its number, and a layer that saw no tokens is grey.

    Args:
        load: tokens (or any measure of load, ≥ 0) per layer and expert, [L, E].
        layers: name of each row, such as the layer's number in the model; `None` counts from 0.
        title: title of the figure.

    Raises:
        ValueError: the shapes do not fit.
    """
    from matplotlib.colors import TwoSlopeNorm

    if load.ndim != 2:
        raise ValueError(f"load has shape {tuple(load.shape)}: must be [layers, experts]")
    rows, experts = load.shape
    names = [str(name) for name in (range(rows) if layers is None else layers)]
    if len(names) != rows:
        raise ValueError(f"{len(names)} layer names for {rows} rows of load")
    counts = load.detach().double().cpu()
    relative = (counts / counts.mean(dim=1, keepdim=True)).numpy()  # NaN where a layer saw nothing

    cell = max(0.16, min(0.45, 9.0 / experts))  # inches
    figure, [[axes]] = grid(1, 1, cell * experts + 2.2, max(0.30, cell) * rows + 1.2)
    axes.set_facecolor("0.75")
    image = axes.imshow(
        relative, cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 0.0, HIGHEST_SHOWN), aspect="auto", interpolation="nearest"
    )
    font = min(8.0, 72 * cell * 0.38)
    for row in range(rows):
        for expert in range(experts):
            value = relative[row, expert]
            if value == 0 or value > HIGHEST_SHOWN:
                text, size = ("×", 1.7 * font) if value == 0 else (f"{value:.{1 if value < 9.95 else 0}f}", font)
                axes.text(expert, row, text, ha="center", va="center", color="white", fontsize=size)
    step = 1 if experts <= 32 else 4
    axes.set_xticks(range(0, experts, step), [str(number) for number in range(0, experts, step)])
    axes.set_yticks(range(rows), names)
    axes.set_xlabel("expert (×: no tokens)" if (relative == 0).any() else "expert")
    axes.set_ylabel("layer")
    axes.set_title(title)
    bar = figure.colorbar(image, ax=axes, extend="max", ticks=[0, 0.5, 1, 1.5, 2])
    bar.set_label("tokens / mean of the layer")
    tidy(figure)
    return figure
