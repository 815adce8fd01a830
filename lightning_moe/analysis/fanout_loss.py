"""Fanout against token loss: whether a token whose next token is hard to predict takes more experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_moe.analysis.observe import Observation
from lightning_moe.analysis.section import Row, Section
from lightning_moe.report.axes import share_limits
from lightning_moe.report.figures import grid, layer_colors, layer_legend, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEWEST_TOKENS = 30  # a mean over fewer is not drawn

TEXT = """\
<p>The number of experts of a token against the loss of the prediction made there. In the table, r is Pearson's
correlation over tokens, R² = r² is the part of the variance of the fanout that a straight line in the loss explains,
and the slope says how many experts more a token takes per nat of loss. "All" is the sum over layers. Positive: compute
goes to what is hard to predict. Near 0: it goes by something else. Left: the mean loss of the tokens with so many
experts in a layer (black: of all layers). Right: the entropy of the router's softmax at these tokens, in nats, from 0
(sure of one expert) to ln E (no preference). It is the entropy of the <em>router</em>, not of the model's prediction,
whose logits are not kept. Means over fewer than 30 tokens are not drawn.</p>
<p>Correlation is no cause: common tokens are easy to predict, and a router may know a token without knowing the
loss.</p>"""


@dataclass(frozen=True)
class Fit:
    """A straight line through fanout (y) against loss (x).

    Args:
        r: Pearson's correlation; `None` if fanout or loss is the same for all tokens.
        slope: experts per nat; `None` like ``r``.
        mean_fanout: experts per token.
        constant: whether all tokens take the same number of experts.
    """

    r: float | None
    slope: float | None
    mean_fanout: float
    constant: bool


class FanoutLoss:
    """Sums of loss and router entropy by fanout, for each layer and for the sum over layers.

    Args:
        num_layers: number L of MoE layers.
        num_experts: number E of experts.

    Attributes:
        tokens: fp64 [L, E + 1], tokens with so many experts; ``loss`` and ``entropy`` the sums of theirs.
        all_tokens: fp64 [L·E + 1], the same for the sum over layers, with ``all_loss``.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.tokens, self.loss, self.entropy = torch.zeros(3, num_layers, num_experts + 1, dtype=torch.float64)
        self.all_tokens, self.all_loss = torch.zeros(2, num_layers * num_experts + 1, dtype=torch.float64)
        self._loss_squares = 0.0
        self._least_loss, self._most_loss = math.inf, -math.inf

    def update(self, seen: Observation) -> None:
        """Add a batch."""
        fanout, loss = seen.experts[seen.valid].sum(-1), seen.loss[seen.valid].double()  # [N, L], [N]
        if not len(loss):
            return
        log_probability = seen.logits[seen.valid].log_softmax(-1)
        entropy = -(log_probability.exp() * log_probability).sum(-1).double()
        for layer in range(fanout.shape[1]):
            self.tokens[layer].index_add_(0, fanout[:, layer], torch.ones_like(loss))
            self.loss[layer].index_add_(0, fanout[:, layer], loss)
            self.entropy[layer].index_add_(0, fanout[:, layer], entropy[:, layer])
        self.all_tokens.index_add_(0, fanout.sum(-1), torch.ones_like(loss))
        self.all_loss.index_add_(0, fanout.sum(-1), loss)
        self._loss_squares += float(loss.square().sum())
        self._least_loss = min(self._least_loss, float(loss.min()))
        self._most_loss = max(self._most_loss, float(loss.max()))

    def fit(self, layer: int | None) -> Fit:
        """Return the line of a layer; `None` stands for the sum over layers."""
        tokens, losses = (self.all_tokens, self.all_loss) if layer is None else (self.tokens[layer], self.loss[layer])
        count, total = float(tokens.sum()), float(losses.sum())
        fanout = torch.arange(len(tokens), dtype=torch.float64)
        mean_fanout, mean_loss = float((tokens * fanout).sum()) / count, total / count
        constant = int((tokens > 0).sum()) == 1
        of_loss = self._loss_squares - count * mean_loss**2
        of_fanout = float((tokens * (fanout - mean_fanout).square()).sum())
        if constant or self._least_loss == self._most_loss or of_loss <= 0:
            return Fit(None, None, mean_fanout, constant)
        covariance = float(((fanout - mean_fanout) * (losses - tokens * mean_loss)).sum())
        return Fit(covariance / math.sqrt(of_loss * of_fanout), covariance / of_loss, mean_fanout, constant)


def section(results: Mapping[str, FanoutLoss], layers: Sequence[str]) -> Section:
    """Make the section of the report, for several checkpoints with the same layers."""
    name, title = "fanout_and_loss", "Fanout against token loss"
    rows: list[Row] = []
    summary: list[Row] = []
    missing: list[str] = []
    for label, result in results.items():
        rows += _rows(label, result, layers)
        fits = {"all": result.fit(None), **{layer: result.fit(number) for number, layer in enumerate(layers)}}
        summary += [_summary(label, layer, fit) for layer, fit in fits.items()]
        constant = {layer: fit.mean_fanout for layer, fit in fits.items() if layer != "all" and fit.constant}
        if len(constant) == len(layers):
            missing.append(f"{label}: every token takes the same number of experts, so nothing can depend on the loss.")
        elif constant:
            same = ", ".join(f"{layer} ({fanout:g})" for layer, fanout in constant.items())
            missing.append(f"{label}: every token takes the same number of experts in {same}: no correlation there.")
    drawn = {label: result for label, result in results.items() if any((result.tokens > 0).sum(-1) > 1)}
    figures = {name: _figure(drawn, layers)} if drawn else {}
    return Section(name, title, TEXT, {"loss_by_fanout": rows}, figures, summary=summary, missing=missing)


def _rows(label: str, result: FanoutLoss, layers: Sequence[str]) -> list[Row]:
    rows: list[Row] = [
        {
            "checkpoint": label,
            "layer": name,
            "fanout": fanout,
            "tokens": int(tokens),
            "loss": float(result.loss[layer, fanout] / tokens),
            "router_entropy": float(result.entropy[layer, fanout] / tokens),
        }
        for layer, name in enumerate(layers)
        for fanout, tokens in enumerate(result.tokens[layer].tolist())
        if tokens
    ]
    return rows + [
        {
            "checkpoint": label,
            "layer": "all",
            "fanout": fanout,
            "tokens": int(tokens),
            "loss": float(result.all_loss[fanout] / tokens),
            "router_entropy": None,
        }
        for fanout, tokens in enumerate(result.all_tokens.tolist())
        if tokens
    ]


def _summary(label: str, layer: str, fit: Fit) -> Row:
    return {
        "checkpoint": label,
        "layer": layer,
        "mean fanout": fit.mean_fanout,
        "r": fit.r,
        "R²": None if fit.r is None else fit.r**2,
        "slope / experts per nat": fit.slope,
    }


def _figure(results: Mapping[str, FanoutLoss], layers: Sequence[str]) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure, axes = grid(len(results), 2, 4.2, 2.7)
    colors = layer_colors(len(layers))
    for (left, right), (label, result) in zip(axes, results.items(), strict=True):
        for layer, color in enumerate(colors):
            _draw(left, result.tokens[layer], result.loss[layer], color=color)
            _draw(right, result.tokens[layer], result.entropy[layer], color=color)
        tokens = result.tokens.sum(0)
        _draw(left, tokens, result.loss.sum(0), color="black", linewidth=2)
        _draw(right, tokens, result.entropy.sum(0), color="black", linewidth=2)
        left.set_title(wrapped(label, 48), loc="left")
        for axis in (left, right):
            axis.set_xlabel("routed experts of a token in a layer")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.set_ylabel("loss / nats")
        right.set_ylabel("router entropy / nats")
        layer_legend(right, layers, colors, [("all layers", {"color": "black", "linewidth": 2})])
    for column in zip(*axes, strict=True):
        share_limits(column, "y", amounts=False)
        share_limits(column, "x", amounts=False)
    return figure


def _draw(axis: Axes, tokens: Tensor, total: Tensor, color: Any, linewidth: float = 1) -> None:
    kept = tokens >= FEWEST_TOKENS
    if not kept.any():  # little text
        kept = tokens > 0
    at = kept.nonzero()[:, 0]
    means = (total[at] / tokens[at]).numpy()
    axis.plot(at.numpy(), means, marker="o", markersize=3, color=color, linewidth=linewidth)
