"""Similarity of experts: cosines of their weights, and of the router's rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_moe.analysis.section import Row, Section, Value
from lightning_moe.model import CausalLM
from lightning_moe.model.routed_layer import RoutedLayer
from lightning_moe.report.axes import share_limits
from lightning_moe.report.figures import COLORS, GREY, grid, layer_ticks, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHUNK_BYTES = 2**26  # that the experts of a layer may take at a time, as fp32
MOST_PAIRS = 2016  # of a layer in the numbers: all pairs of 64 experts
KINDS = {"weights": "weights of the experts", "router": "rows of the router"}

TEXT = """\
<p>How alike the experts of a layer are: the cosine of each pair's weights, all matrices of an expert as one vector,
and of the router's rows, which say what inputs an expert is chosen for. Boxes hold the middle half of a layer's
pairs, and whiskers reach all of them. Of the pairs of random vectors of n numbers, 95% are between the dotted lines
at ±2/√n. Experts that started as copies of one network are near 1 until they specialise. Experts with high cosines
could be merged. A low cosine does not say that two experts compute different things: their hidden units may have
another order. Two rows of the router with a high cosine compete for the same tokens, or serve them together (see
co-activation).</p>
<p><code>cos(i, j) = ⟨w_i, w_j⟩ / (‖w_i‖ ‖w_j‖)</code></p>"""


@dataclass(frozen=True)
class Cosines:
    """Cosines of the experts of a layer.

    Args:
        values: fp64 [E, E]; NaN for an expert of zeros.
        size: number n of numbers of each vector.
    """

    values: Tensor
    size: int

    @cached_property
    def pairs(self) -> list[tuple[float, int, int]]:
        """(cosine, i, j) of all pairs i < j that have one, the highest cosine first."""
        first, second = torch.triu_indices(len(self.values), len(self.values), offset=1)
        found = zip(self.values[first, second].tolist(), first.tolist(), second.tolist(), strict=True)
        return sorted((pair for pair in found if pair[0] == pair[0]), key=lambda pair: (-pair[0], *pair[1:]))


#: kind, of `KINDS`, → cosines of each layer; `None` where the weights cannot be read
Similarity = Mapping[str, Sequence[Cosines | None]]


def similarity(decoder: CausalLM) -> Similarity:
    """Compute the cosines of all layers. Weights are read once, some columns of all experts at a time."""
    layers = list(decoder.moe_layers())
    return {
        "weights": [_of_experts(layer) for layer in layers],
        "router": [_of_router(layer) for layer in layers],
    }


def _of_experts(layer: RoutedLayer) -> Cosines | None:
    experts = [layer.expert_weights(expert) for expert in range(layer.state.num_experts)]
    if not experts[0]:
        return None
    products = sum(_products(chunk) for chunk in _columns(experts))
    assert isinstance(products, Tensor)
    return _cosines(products, sum(matrix.numel() for matrix in experts[0]))


def _of_router(layer: RoutedLayer) -> Cosines | None:
    rows = layer.router_weights()
    return None if rows is None else _cosines(_products(rows), rows.shape[1])


def _columns(experts: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
    """Iterate over the experts' weights, flattened and next to each other: [E, columns], few enough for the memory."""
    most = max(1, CHUNK_BYTES // (4 * len(experts)))
    for matrices in zip(*experts, strict=True):
        flat = [matrix.reshape(-1) for matrix in matrices]
        for start in range(0, len(flat[0]), most):
            yield torch.stack([vector[start : start + most] for vector in flat])


def _products(vectors: Tensor) -> Tensor:
    """Return the scalar products of the rows of [E, n], fp64 [E, E]."""
    vectors = vectors.detach().float()
    return (vectors @ vectors.T).cpu().double()


def _cosines(products: Tensor, size: int) -> Cosines:
    norms = products.diagonal().sqrt()
    return Cosines(products / (norms[:, None] * norms), size)


def section(results: Mapping[str, Similarity], layers: Sequence[str]) -> Section:
    """Make the section of the report, for several checkpoints with the same layers."""
    name, title = "similarity", "Similarity of experts"
    rows: list[Row] = []
    summary: list[Row] = []
    missing: list[str] = []
    for label, result in results.items():
        for number, layer in enumerate(layers):
            found = {kind: result[kind][number] for kind in KINDS}
            rows += _rows(label, layer, found)
            summary.append(_summary(label, layer, found))
        missing += [
            f"{label}: the {meaning} cannot be read."
            for kind, meaning in KINDS.items()
            if all(cosines is None for cosines in result[kind])
        ]
    if not rows:
        return Section(name, title, TEXT, missing=missing or ("A layer has one expert only.",))
    return Section(name, title, TEXT, {name: rows}, {name: _figure(results, layers)}, summary=summary, missing=missing)


def _rows(label: str, layer: str, found: Mapping[str, Cosines | None]) -> list[Row]:
    return [
        {"checkpoint": label, "layer": layer, "of": kind, "expert": i, "other": j, "cosine": cosine}
        for kind, cosines in found.items()
        if cosines is not None
        for cosine, i, j in cosines.pairs[:MOST_PAIRS]
    ]


def _summary(label: str, layer: str, found: Mapping[str, Cosines | None]) -> Row:
    row: dict[str, Value] = {"checkpoint": label, "layer": layer}
    for kind, cosines in found.items():
        pairs = [] if cosines is None else cosines.pairs
        row[f"{kind}, mean"] = sum(cosine for cosine, _, _ in pairs) / len(pairs) if pairs else None
        row[f"{kind}, highest"] = pairs[0][0] if pairs else None
        row[f"{kind}, most alike"] = f"{pairs[0][1]} – {pairs[0][2]}" if pairs else None
        row[f"{kind}, ± by chance"] = None if cosines is None else 2 * cosines.size**-0.5
    return row


def _figure(results: Mapping[str, Similarity], layers: Sequence[str]) -> Figure:
    figure, axes = grid(len(results), 2, max(3.6, 0.14 * len(layers) + 1.4), 2.5)
    for line, (label, result) in zip(axes, results.items(), strict=True):
        for axis, (kind, meaning) in zip(line, KINDS.items(), strict=True):
            _boxes(axis, result[kind])
            layer_ticks(axis.xaxis, layers, most=16)
            axis.set_xlabel("layer")
            axis.set_title(meaning)
        line[0].set_ylabel(wrapped(label, 20) + "\n\ncosine", fontsize=8)
    for column in zip(*axes, strict=True):
        drawn = [axis for axis in column if axis.get_visible()]
        if drawn:
            share_limits(drawn, "y", amounts=False)
    return figure


def _boxes(axis: Axes, layers: Sequence[Cosines | None]) -> None:
    there = [(number, cosines) for number, cosines in enumerate(layers) if cosines is not None and cosines.pairs]
    if not there:
        axis.set_visible(False)
        return
    blue, red = {"color": COLORS[0]}, {"color": COLORS[5], "linewidth": 1.6}
    axis.boxplot(
        [[cosine for cosine, _, _ in cosines.pairs] for _, cosines in there],
        positions=[number for number, _ in there], whis=(0, 100), widths=0.6,
        medianprops=red, boxprops=blue, whiskerprops=blue, capprops=blue,
    )  # fmt: skip
    for sign in (-1, 1):
        bound = [2 * sign * cosines.size**-0.5 for _, cosines in there]
        axis.plot([number for number, _ in there], bound, ".", color=GREY, linestyle=":", markersize=4)
