"""Fanout by position and by loss, per layer and over all layers (the paper's Fig. 5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_moe.analysis.observe import Observation
from lightning_moe.analysis.section import Row, Section
from lightning_moe.report.axes import share_limits
from lightning_moe.report.figures import GREY, grid, layer_colors, layer_legend, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOSS_STEP, LOSS_BINS = 0.5, 32  # nats; the last bin has everything above
POSITION_GROUPS = 32
FEWEST_TOKENS = 30  # a mean over fewer is not drawn

TEXT = """\
<p>How many routed experts a token takes, by its position in the context window and by how hard the token after it
was to predict (loss of that prediction, bins of 0.5 nats; bins with fewer than 30 tokens are left out). Values are
per MoE layer, so the trained-for target is one number (grey); black is the mean over layers, with ±2 standard
errors. All checkpoints share their axes. A router whose fanout rises with the loss spends compute where the model is
unsure. Token choice is flat by construction.</p>
<p><code>fanout_t = Σ_i z_{t,i}</code>; the shared expert is not counted.</p>"""


class Fanout:
    """The sums of fanout by position and by loss bin, per layer.

    Args:
        num_layers: number L of layers.
        sequence_length: tokens S of a window.
    """

    def __init__(self, num_layers: int, sequence_length: int) -> None:
        self.by_position = _Sums(sequence_length, num_layers)
        self.by_loss = _Sums(LOSS_BINS, num_layers)

    def update(self, seen: Observation) -> None:
        """Add a batch."""
        fanout = seen.experts.sum(-1)[seen.valid].double()  # [N, L]
        position = torch.arange(seen.tokens.shape[1]).expand_as(seen.tokens)[seen.valid]
        self.by_position.add(position, fanout)
        self.by_loss.add((seen.loss[seen.valid] / LOSS_STEP).long().clamp_max(LOSS_BINS - 1), fanout)

    def by_difficulty(self) -> tuple[float, float, float]:
        """Return the mean fanout per layer: of all tokens, and of the easiest and the hardest quarter by loss.

        A quarter consists of whole loss bins, one at least, so it is only about a quarter.
        """
        sums = self.by_loss
        total = float(sums.count.sum())
        upto = sums.count.cumsum(0)
        before = upto - sums.count
        filled = sums.count.nonzero()  # one bin at least at either end, however many tokens it has
        easy = upto <= max(total / 4, float(upto[filled.min()]))
        hard = before >= min(total * 3 / 4, float(before[filled.max()]))
        all_tokens, easiest, hardest = (
            float(sums.total[chosen].sum() / sums.count[chosen].sum() / sums.total.shape[1])
            for chosen in (sums.count > 0, easy, hard)
        )
        return all_tokens, easiest, hardest


class _Sums:
    """The tokens, the sums per layer, and the squares of the mean over layers, for each group."""

    def __init__(self, groups: int, num_layers: int) -> None:
        self.count = torch.zeros(groups, dtype=torch.float64)
        self.total = torch.zeros(groups, num_layers, dtype=torch.float64)
        self.squares = torch.zeros(groups, dtype=torch.float64)

    def add(self, group: Tensor, fanout: Tensor) -> None:
        """Add tokens: ``group`` int64 [N], ``fanout`` fp64 [N, L]."""
        self.count.index_add_(0, group, torch.ones_like(group, dtype=torch.float64))
        self.total.index_add_(0, group, fanout)
        self.squares.index_add_(0, group, fanout.mean(-1).square())

    def merged(self, groups: int) -> _Sums:
        """Merge neighbouring groups, so that there are at most ``groups``."""
        size = -(-len(self.count) // groups)
        merged = _Sums(-(-len(self.count) // size), self.total.shape[1])
        index = torch.arange(len(self.count)) // size
        for mine, theirs in zip(vars(self).values(), vars(merged).values(), strict=True):
            theirs.index_add_(0, index, mine)
        return merged

    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the means per layer [groups, L], over layers [groups], and the latter's standard error [groups].

        A group without tokens has NaN.
        """
        per_layer = self.total / self.count[:, None]
        mean = per_layer.mean(-1)
        variance = (self.squares / self.count - mean.square()).clamp_min(0)
        return per_layer, mean, (variance / self.count).sqrt()


def section(results: Mapping[str, Fanout], layers: Sequence[str], targets: Mapping[str, float]) -> Section:
    """Make the section of the report, for several checkpoints with the same layers.

    Args:
        results: sums of each checkpoint, by its label.
        layers: names of the layers.
        targets: experts per token and layer that each checkpoint was trained for, by its label.
    """
    position: list[Row] = []
    loss: list[Row] = []
    summary: list[Row] = []
    figure, axes = grid(len(results), 2, 4.6, 2.9)
    colors = layer_colors(len(layers))
    for row, (label, result) in zip(axes, results.items(), strict=True):
        position += _rows(label, result.by_position, layers, lambda index: {"position": index})
        loss += _rows(label, result.by_loss, layers, _loss_bin)
        summary.append(_summary(label, result))
        grouped = result.by_position.merged(POSITION_GROUPS)
        size = -(-len(result.by_position.count) // POSITION_GROUPS)
        _draw(row[0], (torch.arange(len(grouped.count)) + 0.5) * size, grouped, colors, targets[label])
        row[0].set_xlabel(f"position in the context / tokens (means of {size})" if size > 1 else "position / tokens")
        _draw(row[1], (torch.arange(LOSS_BINS) + 0.5) * LOSS_STEP, result.by_loss, colors, targets[label])
        row[1].set_xlabel("loss of the next token / nats")
        row[0].set_title(wrapped(label, 48), loc="left")
        mean = {"color": "black", "linewidth": 2}
        target = {"color": GREY, "linestyle": ":"}
        layer_legend(row[1], layers, colors, [("mean of layers", mean), ("target", target)])
    said = share_limits([axis for row in axes for axis in row], "y")
    share_limits([row[1] for row in axes], "x")
    for row in axes:
        row[0].set_ylabel("routed experts per token\nand layer" + said.replace(" (", "\n("))
    tables = {"fanout_by_position": position, "fanout_by_loss": loss}
    return Section("fanout", "Fanout by position and by loss", TEXT, tables, {"fanout": figure}, summary=summary)


def _loss_bin(index: int) -> Row:
    high = (index + 1) * LOSS_STEP
    return {"loss_from": index * LOSS_STEP, "loss_to": high if index < LOSS_BINS - 1 else None}


def _rows(label: str, sums: _Sums, layers: Sequence[str], where: Callable[[int], Row]) -> list[Row]:
    per_layer, mean, error = sums.means()
    return [
        {
            "checkpoint": label,
            **where(index),
            "tokens": int(sums.count[index]),
            **{f"fanout_{layer}": float(per_layer[index, number]) for number, layer in enumerate(layers)},
            "fanout_mean": float(mean[index]),
            "standard_error": float(error[index]),
        }
        for index in range(len(sums.count))
        if sums.count[index] > 0
    ]


def _summary(label: str, result: Fanout) -> Row:
    mean, easiest, hardest = result.by_difficulty()
    return {
        "checkpoint": label,
        "mean fanout per layer": mean,
        "easiest tokens (about a quarter)": easiest,
        "hardest tokens (about a quarter)": hardest,
    }


def _draw(axis: Axes, x: Tensor, sums: _Sums, colors: Sequence[Any], target: float) -> None:
    kept = sums.count >= FEWEST_TOKENS
    if kept.sum() < 2:  # little text
        kept = sums.count > 0
    per_layer, mean, error = (values[kept].numpy() for values in sums.means())
    at = x[kept].numpy()
    for layer, color in enumerate(colors):
        axis.plot(at, per_layer[:, layer], color=color, linewidth=1)
    axis.plot(at, mean, color="black", linewidth=2)
    axis.fill_between(at, (mean - 2 * error).clip(0), mean + 2 * error, color="black", alpha=0.15, linewidth=0)
    axis.axhline(target, color=GREY, linestyle=":", linewidth=1)
