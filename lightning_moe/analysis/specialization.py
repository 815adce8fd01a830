"""Use of the experts by domain (the paper's Figs. 4b and 22)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_moe.analysis.experts import by_mean
from lightning_moe.analysis.observe import Observation
from lightning_moe.analysis.section import Row, Section
from lightning_moe.report.axes import MOST_EXPERT_LABELS, text_color
from lightning_moe.report.figures import COLORS, grid, layer_ticks, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm

LARGEST_RATIO = 8.0  # the ends of the colour scale

TEXT = """\
<p>The share of a domain's tokens that goes to each expert, relative to the target share ρ: 1 (white) is what a
router without preferences gives, orange is more, purple less (logarithmic; ends at 8 and 1/8; a frame marks an expert
that no token of the domain takes). Rows are layers, the first at the top. In each layer experts are sorted by the mean
of what is shown, over the domains; the number in a cell is the expert's. Experts whose colour differs between domains
have specialised; the table has the total variation distance between two domains' expert usage (0: the same
experts, 1: disjoint ones), and what the choice of documents alone would give, measured on halves of them.</p>
<p><code>share_{d,i} = Σ_{t in d} z_{t,i} / N_d</code>; <code>TV = ½ Σ_i |q_{d,i} − q_{d',i}|</code> with
<code>q_{d,i} = share_{d,i} / Σ_j share_{d,j}</code>. By the choice of documents: <code>½ √(h_d² + h_{d'}²)</code>,
where <code>h</code> is the TV between two halves of a domain, whole documents each; mean over layers.</p>"""


class Specialization:
    """Counts of (domain, layer, expert), for two halves of each domain.

    The halves consist of whole documents, because the tokens of a document are alike: a domain differs from another
    sample of itself by more than independent tokens would. Each document goes to the half with fewer tokens so far.

    Args:
        num_domains: number D of domains.
        num_layers: number L of MoE layers.
        num_experts: number E of routed experts.
        end_of_text_id: id of the token that begins each document.

    Attributes:
        half_tokens: int64 [2, D], tokens of each half.
        half_load: int64 [2, D, L, E], tokens of each half that went to each expert.
    """

    def __init__(self, num_domains: int, num_layers: int, num_experts: int, end_of_text_id: int) -> None:
        self.end_of_text_id = end_of_text_id
        self.half_tokens = torch.zeros(2, num_domains, dtype=torch.int64)
        self.half_load = torch.zeros(2, num_domains, num_layers, num_experts, dtype=torch.int64)
        self._half = [0] * num_domains  # of the document that is being read

    @property
    def tokens(self) -> Tensor:
        """Tokens of each domain, int64 [D]."""
        return self.half_tokens.sum(0)

    @property
    def load(self) -> Tensor:
        """Tokens of each domain that went to each expert, int64 [D, L, E]."""
        return self.half_load.sum(0)

    def update(self, seen: Observation) -> None:
        """Add a batch. The windows of a domain must come in the order of its text."""
        for tokens, valid, experts, domain in zip(
            seen.tokens, seen.valid, seen.experts, seen.domains.tolist(), strict=True
        ):
            starts = ((tokens == self.end_of_text_id) & valid).nonzero().flatten().tolist()
            for start, end in pairwise([0, *starts, int(valid.sum())]):  # what is not valid is at the end
                if start in starts:
                    self._half[domain] = int(self.half_tokens[:, domain].argmin())
                half = self._half[domain]
                self.half_tokens[half, domain] += end - start
                self.half_load[half, domain] += experts[start:end].sum(0)

    def shares(self) -> Tensor:
        """Return the share of each domain's tokens that goes to each expert, fp64 [D, L, E]."""
        return self.load / self.tokens[:, None, None].clamp_min(1)

    def distance(self, first: int, second: int) -> Tensor:
        """Return the total variation between two domains' usage, fp64 [L]."""
        return _total_variation(self.load[first], self.load[second])

    def distance_by_documents(self, first: int, second: int) -> Tensor | None:
        """Return the total variation that the choice of documents alone would give, fp64 [L].

        The difference of two halves has four times the variance of the mean over the domain. The variances of two
        domains add up. `None` if a domain has one document only, which has no halves.
        """
        if not self.half_tokens[:, [first, second]].all():
            return None
        halves = [_total_variation(self.half_load[0, domain], self.half_load[1, domain]) for domain in (first, second)]
        return torch.hypot(*halves) / 2


def _total_variation(load: Tensor, other: Tensor) -> Tensor:
    """Return the distance of the usages of two loads [L, E], fp64 [L]."""
    usage, other_usage = (counts.double() / counts.sum(-1, keepdim=True).clamp_min(1) for counts in (load, other))
    return (usage - other_usage).abs().sum(-1) / 2


def section(
    results: Mapping[str, Specialization],
    domains: Sequence[str],
    layers: Sequence[str],
    rates: Mapping[str, Sequence[float]],
) -> Section:
    """Return the section of several checkpoints with the same layers.

    Args:
        results: label → counts.
        domains: names of the domains, in the order of the counts.
        layers: names of the layers.
        rates: label → target share ρ of each layer.
    """
    from matplotlib.colors import LogNorm

    rows: list[Row] = []
    summary: list[Row] = []
    num_experts = next(iter(results.values())).load.shape[-1]
    width = max(3.2, min(0.2 * num_experts, 9.0))
    figure, axes = grid(len(results), len(domains), width, max(1.5, 0.24 * len(layers) + 0.9), sharex=True, sharey=True)
    norm = LogNorm(1 / LARGEST_RATIO, LARGEST_RATIO)
    for line, (label, result) in zip(axes, results.items(), strict=True):
        shares = result.shares()
        target = torch.tensor(rates[label], dtype=torch.float64)
        relative = shares / target[:, None]
        order = by_mean(relative.mean(0))
        for index, (axis, domain) in enumerate(zip(line, domains, strict=True)):
            _draw(axis, relative[index].gather(1, order), order, norm)
            axis.set_title(f"{domain} ({int(result.tokens[index]):,} tokens)")
            layer_ticks(axis.yaxis, layers, most=24)
            rows += _rows(label, domain, result, index, layers, target)
        line[0].set_ylabel(wrapped(label, 20) + "\n\nlayer", fontsize=8)
        summary += _summary(label, result, domains, layers)
    for axis in axes[-1]:
        axis.set_xlabel("experts, sorted by mean")
    everywhere = [axis for line in axes for axis in line]
    bar = figure.colorbar(axes[0][0].images[0], ax=everywhere, ticks=[1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8])
    bar.minorticks_off()
    bar.set_ticklabels(["≤ 1/8", "1/4", "1/2", "1", "2", "4", "≥ 8"])
    bar.set_label("share of the domain's tokens / target", fontsize=9)
    return Section(
        "specialization",
        "Specialisation of experts by domain",
        TEXT,
        {"specialization": rows},
        {"specialization": figure},
        summary=summary,
        missing=() if len(domains) > 1 else ("One domain only: nothing to compare. Add --text NAME=PATH.",),
    )


def _draw(axis: Axes, relative: Tensor, order: Tensor, norm: LogNorm) -> None:
    """Draw shares relative to the target, with the experts' numbers; both [L, E] in the order of the figure."""
    from matplotlib.patches import Rectangle

    shown = relative.clamp(1 / LARGEST_RATIO, LARGEST_RATIO)
    image = axis.imshow(shown.numpy(), cmap="PuOr_r", norm=norm, aspect="auto", interpolation="nearest")
    axis.set_xticks([])
    step = -(-order.shape[1] // MOST_EXPERT_LABELS)
    for layer, experts in enumerate(order.tolist()):
        for place, expert in enumerate(experts):
            if relative[layer, place] == 0:
                corner = (place - 0.45, layer - 0.45)
                axis.add_patch(Rectangle(corner, 0.9, 0.9, fill=False, edgecolor=COLORS[5], linewidth=1.4))
            if place % step == 0:
                color = text_color(image.cmap(float(norm(float(shown[layer, place])))))
                axis.text(place, layer, str(expert), ha="center", va="center", color=color, fontsize=6)


def _rows(
    label: str, domain: str, result: Specialization, index: int, layers: Sequence[str], target: Tensor
) -> list[Row]:
    shares = result.shares()[index]
    return [
        {
            "checkpoint": label,
            "domain": domain,
            "layer": layer,
            "expert": expert,
            "tokens": int(result.load[index, number, expert]),
            "share": float(shares[number, expert]),
            "relative_to_target": float(shares[number, expert] / target[number]),
        }
        for number, layer in enumerate(layers)
        for expert in range(shares.shape[1])
    ]


def _summary(label: str, result: Specialization, domains: Sequence[str], layers: Sequence[str]) -> list[Row]:
    rows: list[Row] = []
    for first, second in combinations(range(len(domains)), 2):
        distance, by_documents = result.distance(first, second), result.distance_by_documents(first, second)
        rows.append(
            {
                "checkpoint": label,
                "domains": f"{domains[first]} – {domains[second]}",
                **{f"TV {name}": float(value) for name, value in zip(layers, distance, strict=True)},
                "by the choice of documents": "one document" if by_documents is None else float(by_documents.mean()),
            }
        )
    return rows
