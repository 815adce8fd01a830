"""Co-activation of experts (Section 5.2 of OLMoE, arXiv 2409.02060): which experts serve the same tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_moe.analysis.observe import Observation
from lightning_moe.analysis.section import Row, Section
from lightning_moe.report.figures import panel_grid, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEWEST_TOKENS = 30  # shares of fewer tokens are noise
MOST_EXPERTS = 16  # in a panel
MOST_PAIRS = 2016  # of a layer in the numbers: all pairs of 64 experts
PANELS_IN_A_ROW = 6

TEXT = """\
<p>The share of an expert's tokens (row) that also went to another expert (column) of the same layer. Each panel has the
experts of the strongest pairs of its layer, at most 16; experts with fewer than 30 tokens are left out. The diagonal is
empty. A pair that is dark in both directions works as one larger expert. A row that is dark in one column only is an
expert that needs another one. The table compares the strongest pair with what the loads alone would give: the other
experts of a token drawn in proportion to their loads. A ratio of 1 says that the pair means nothing.</p>
<p><code>share_{i,j} = N_{ij} / N_i</code> with N_i tokens of expert i, N_ij of them also of j; <code>by loads_{i,j} =
(Σ_{l≠i} N_{il} / N_i) · N_j / Σ_{l≠i} N_l</code>. The numbers also have N_j / N, which independent experts would give.
A router that takes a fixed number of experts is below that on average, because its experts compete for places.</p>"""


class Coactivation:
    """Tokens that two experts of a layer have in common.

    Args:
        num_layers: number L of MoE layers.
        num_experts: number E of experts.

    Attributes:
        both: fp64 [L, E, E], tokens of each pair of experts; the diagonal has the tokens of each expert.
        num_tokens: number N of tokens.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.both = torch.zeros(num_layers, num_experts, num_experts, dtype=torch.float64)
        self.num_tokens = 0

    def update(self, seen: Observation) -> None:
        """Add a batch."""
        experts = seen.experts[seen.valid].float().transpose(0, 1)  # [L, N, E]; fp32 counts 16 million exactly
        self.both += experts.mT @ experts
        self.num_tokens += experts.shape[1]

    @property
    def tokens(self) -> Tensor:
        """Tokens of each expert, fp64 [L, E]."""
        return self.both.diagonal(dim1=-2, dim2=-1)

    def _others(self) -> Tensor:
        """Return the tokens of pairs of different experts, fp64 [L, E, E], with a diagonal of zeros."""
        return self.both - torch.diag_embed(self.tokens)

    def shares(self) -> Tensor:
        """Return the share of the tokens of expert i that also went to j, fp64 [L, E (i), E (j)].

        The diagonal is NaN, and so are experts without a token.
        """
        shares = self.both / self.tokens[..., None]
        return shares.masked_fill(torch.eye(shares.shape[-1], dtype=torch.bool), torch.nan)

    def by_loads(self) -> Tensor:
        """Return the shares to expect if the other experts of a token were drawn in proportion to their loads.

        Like `shares`, fp64 [L, E, E].
        """
        load = self.tokens
        places = self._others().sum(-1) / load  # other experts of a token of expert i
        rest = load.sum(-1, keepdim=True) - load
        expected = (places / rest)[..., None] * load[:, None, :]
        return expected.masked_fill(torch.eye(load.shape[-1], dtype=torch.bool), torch.nan)

    def strongest(self, layer: int, most: int) -> list[tuple[int, int]]:
        """Return the ordered pairs (i, j) of a layer with the largest shares, the largest first, at most ``most``.

        Pairs without a common token, and experts with fewer than `FEWEST_TOKENS` tokens, do not count. If all experts
        have so few, those with tokens do.
        """
        load = self.tokens[layer]
        fewest = FEWEST_TOKENS if bool((load >= FEWEST_TOKENS).any()) else 1
        shares = (self.both[layer] / load[:, None]).fill_diagonal_(0.0)
        shares[load < fewest] = 0.0
        best = shares.flatten().sort(descending=True, stable=True)
        kept = best.indices[best.values > 0][:most].tolist()
        return [divmod(place, len(load)) for place in kept]

    def together(self) -> bool:
        """Return whether any token takes two experts of a layer."""
        return bool(self._others().any())


def section(results: Mapping[str, Coactivation], layers: Sequence[str]) -> Section:
    """Make the section of the report, for several checkpoints with the same layers."""
    name, title = "coactivation", "Co-activation of experts"
    rows: list[Row] = []
    summary: list[Row] = []
    shown = {label: result for label, result in results.items() if result.together()}
    figures = {}
    for number, (label, result) in enumerate(shown.items()):
        rows += _rows(label, result, layers)
        summary += [_summary(label, result, layer, number) for number, layer in enumerate(layers)]
        figures[name if len(results) == 1 else f"{name}_{number + 1}"] = _figure(label, result, layers)
    missing = [f"{label}: no token takes two experts of a layer." for label in results if label not in shown]
    tables = {name: rows} if rows else {}
    return Section(name, title, TEXT, tables, figures, summary=summary, missing=missing)


def _rows(label: str, result: Coactivation, layers: Sequence[str]) -> list[Row]:
    shares, by_loads, both = (values.tolist() for values in (result.shares(), result.by_loads(), result.both))
    return [
        {
            "checkpoint": label,
            "layer": name,
            "expert": i,
            "other": j,
            "tokens": int(both[layer][i][i]),
            "tokens_of_both": int(both[layer][i][j]),
            "share": shares[layer][i][j],
            "share_by_loads": by_loads[layer][i][j],
            "share_if_independent": both[layer][j][j] / result.num_tokens,
        }
        for layer, name in enumerate(layers)
        for i, j in result.strongest(layer, MOST_PAIRS)
    ]


def _summary(label: str, result: Coactivation, name: str, layer: int) -> Row:
    row: dict[str, str | float | None] = {"checkpoint": label, "layer": name}
    pairs = result.strongest(layer, 1)
    if not pairs:
        return row | {"strongest pair": None, "share": None, "by the loads": None, "ratio": None}
    [(i, j)] = pairs
    share, by_loads = float(result.shares()[layer, i, j]), float(result.by_loads()[layer, i, j])
    return row | {"strongest pair": f"{i} → {j}", "share": share, "by the loads": by_loads, "ratio": share / by_loads}


def _figure(label: str, result: Coactivation, layers: Sequence[str]) -> Figure:
    figure, axes = panel_grid(len(layers), PANELS_IN_A_ROW, 2.3, 2.4)
    shares = result.shares()
    for layer, (axis, name) in enumerate(zip(axes, layers, strict=True)):
        pairs = result.strongest(layer, shares.shape[-1] ** 2)
        experts = list(dict.fromkeys(expert for pair in pairs for expert in pair))[:MOST_EXPERTS]
        axis.set_title(name)
        if not experts:
            axis.text(0.5, 0.5, "one expert\nper token", ha="center", va="center", transform=axis.transAxes, fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
            continue
        shown = shares[layer][experts][:, experts]
        axis.imshow(shown.numpy(), cmap="Oranges", vmin=0, vmax=1, interpolation="nearest")
        size = 7 if len(experts) <= 8 else 5
        axis.set_xticks(range(len(experts)), [str(e) for e in experts], fontsize=size, rotation=90)
        axis.set_yticks(range(len(experts)), [str(e) for e in experts], fontsize=size)
    drawn = [axis.images[0] for axis in axes if axis.images]
    bar = figure.colorbar(drawn[0], ax=axes[:PANELS_IN_A_ROW])
    bar.set_label("share of the row's tokens\nthat the column has too", fontsize=9)
    figure.suptitle(wrapped(label, 80), fontsize=10)
    return figure
