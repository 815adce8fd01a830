"""The report's section on counterfactual regret: how much a better route of the same size would win."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_moe.analysis.counterfactual import Counterfactuals
from lightning_moe.analysis.section import Row, Section, Value
from lightning_moe.report.figures import GREY, grid, layer_ticks, line_style, shared_legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "regret"
QUARTERS = 4
ROUNDING = 1e-5  # nats: losses that differ by less are equal
MISSING = "off by default, because it costs many passes: --regret_tokens N measures it for N tokens of the text."

TEXT = """\
<p>What another choice of experts would have done to a token's own loss. One MoE layer at a time, single tokens take
other sets of as many experts as they took; all other layers and tokens keep their routes, and the gates are the
router's own. Regret is the loss on the route taken minus that on the best route tried. The best is picked
with the next token known, so no router can win all of it. It also grows with the number of routes tried (right). Set
it against the other two numbers: the mean of the other routes (what choosing blindly among them would cost), and how
often the route taken is the best, beside how often chance alone would make it the best. Tokens with no or all experts
have no other route and are left out.</p>
<p><code>regret = loss(route taken) − min over routes tried of the loss</code>, in nats, over (token, layer) pairs; the
column "later" is what the best route does to the summed loss of the tokens after it in its window, which regret does
not count.</p>"""


class Regret:
    """Regret of (token, layer) pairs, and what it is compared with.

    Args:
        measured: losses on the routes tried.
    """

    def __init__(self, measured: Counterfactuals) -> None:
        self.measured = measured
        loss = measured.loss
        self.taken = loss[..., 0]  # fp64 [T, L], as all below
        self.num_tried = (~loss.isnan()).sum(-1)
        self.has_choice = self.num_tried > 1  # bool [T, L]
        known = loss.nan_to_num(torch.inf)
        self.best, at = known.min(-1)
        self.regret = self.taken - self.best
        self.is_best = (self.regret <= ROUNDING).double()
        self.others = loss[..., 1:].nansum(-1) / (self.num_tried - 1) - self.taken  # NaN without a choice
        self.later = (measured.later.gather(-1, at[..., None])[..., 0] - measured.later[..., 0]).where(
            self.is_best == 0, 0.0
        )

    def numbers(self, chosen: Tensor) -> dict[str, Value]:
        """Return the means over the pairs of ``chosen``, bool [T, L], that have a choice."""
        pairs = chosen & self.has_choice
        count = int(pairs.sum())

        def mean(values: Tensor) -> float | None:
            return float(values[pairs].double().mean()) if count else None

        spread = self.regret[pairs].std().item() / count**0.5 if count > 1 else None
        return {
            "pairs": int(chosen.sum()),
            "pairs_with_a_choice": count,
            "routes_tried": mean(self.num_tried),
            "all_routes_tried": mean(self.num_tried == self.measured.num_possible),
            "loss_taken": mean(self.taken),
            "regret": mean(self.regret),
            "standard_error": spread,
            "other_routes_minus_taken": mean(self.others),
            "taken_is_best": mean(self.is_best),
            "taken_is_best_by_chance": mean(1 / self.num_tried.double()),
            "later": mean(self.later),
        }

    @property
    def everything(self) -> Tensor:
        """All pairs, bool [T, L]."""
        return torch.ones_like(self.has_choice)

    def layer(self, index: int) -> Tensor:
        """Return the pairs of one layer, bool [T, L]."""
        chosen = torch.zeros_like(self.has_choice)
        chosen[:, index] = True
        return chosen

    def quarters(self) -> list[Tensor]:
        """Return the tokens' quarters by the loss on the route taken, the easiest first; each bool [T, L]."""
        order = self.taken.mean(-1).argsort()
        masks = [torch.zeros_like(self.has_choice) for _ in range(QUARTERS)]
        for mask, tokens in zip(masks, order.tensor_split(QUARTERS), strict=True):
            mask[tokens] = True
        return [mask for mask in masks if mask.any()]

    def by_number_of_routes(self) -> list[float]:
        """Return the mean regret if only the first 1, 2, … routes had been tried, over pairs with a choice."""
        known = self.measured.loss[self.has_choice].nan_to_num(torch.inf)
        most = int(self.num_tried.max())
        return [float((known[:, 0] - known[:, :tried].amin(-1)).mean()) for tried in range(1, most + 1)]


def section(measured: Mapping[str, Counterfactuals], layers: Sequence[str]) -> Section:
    """Make the section of the report, for several checkpoints with the same layers.

    Args:
        measured: losses of each checkpoint, by its label; empty if they were not asked for.
        layers: names of the layers.
    """
    title = "Counterfactual regret of the routes"
    if not measured:
        return Section(NAME, title, TEXT, missing=[MISSING])
    found = {label: Regret(losses) for label, losses in measured.items()}
    missing = [
        f"{label}: no token of {len(regret.taken)} has another route; each takes no expert, or all of them."
        for label, regret in found.items()
        if not regret.has_choice.any()
    ]
    found = {label: regret for label, regret in found.items() if regret.has_choice.any()}
    if not found:
        return Section(NAME, title, TEXT, missing=missing)
    by_layer: list[Row] = []
    by_loss: list[Row] = []
    by_routes: list[Row] = []
    for label, regret in found.items():
        for index, layer in enumerate(layers):
            by_layer.append({"checkpoint": label, "layer": layer, **regret.numbers(regret.layer(index))})
        for number, quarter in enumerate(regret.quarters(), start=1):
            by_loss += [
                {"checkpoint": label, "quarter": number, "layer": layer, **regret.numbers(quarter & chosen)}
                for layer, chosen in _with_all(regret, layers)
            ]
        by_routes += [
            {"checkpoint": label, "routes": number, "regret": value}
            for number, value in enumerate(regret.by_number_of_routes(), start=1)
        ]
    tables = {"regret_by_layer": by_layer, "regret_by_loss": by_loss, "regret_by_number_of_routes": by_routes}
    figure, [[left, middle, right]] = grid(1, 3, 3.7, 3.1)
    for index, (label, regret) in enumerate(found.items()):
        _draw_layers(left, regret, line_style(index), label)
        _draw_quarters(middle, regret, line_style(index))
        values = regret.by_number_of_routes()
        right.plot(range(1, len(values) + 1), values, marker="o", markersize=3, **line_style(index))
    _label(left, middle, right, layers)
    shared_legend(figure)
    summary = [_summary(label, regret) for label, regret in found.items()]
    return Section(NAME, title, TEXT, tables, {NAME: figure}, summary=summary, missing=missing)


def _with_all(regret: Regret, layers: Sequence[str]) -> list[tuple[str, Tensor]]:
    return [*((layer, regret.layer(index)) for index, layer in enumerate(layers)), ("all", regret.everything)]


def _summary(label: str, regret: Regret) -> Row:
    numbers = regret.numbers(regret.everything)
    hardest = regret.numbers(regret.quarters()[-1])
    return {
        "checkpoint": label,
        "tokens": len(regret.taken),
        "with another route, of (token, layer) pairs": float(regret.has_choice.double().mean()),
        "routes tried": numbers["routes_tried"],
        "regret / nats": numbers["regret"],
        "the same, quarter of highest loss": hardest["regret"],
        "other routes − taken, mean / nats": numbers["other_routes_minus_taken"],
        "route taken is the best": numbers["taken_is_best"],
        "the same by chance": numbers["taken_is_best_by_chance"],
        "later tokens, if the best is taken / nats": numbers["later"],
    }


def _draw_layers(axis: Axes, regret: Regret, style: Mapping[str, Any], label: str) -> None:
    """Draw the other routes above, and the best one below the level of the route taken."""
    rows = [regret.numbers(regret.layer(index)) for index in range(regret.taken.shape[1])]
    at = [index for index, row in enumerate(rows) if row["pairs_with_a_choice"]]
    axis.plot(at, [_number(rows[i]["other_routes_minus_taken"]) for i in at], marker="^", markersize=5, **style)
    axis.plot(at, [-_number(rows[i]["regret"]) for i in at], marker="v", markersize=5, label=label, **style)


def _draw_quarters(axis: Axes, regret: Regret, style: Mapping[str, Any]) -> None:
    rows = [regret.numbers(quarter) for quarter in regret.quarters()]
    at = [number for number, row in enumerate(rows, start=1) if row["pairs_with_a_choice"]]
    values, errors = ([_number(rows[number - 1][key]) for number in at] for key in ("regret", "standard_error"))
    axis.errorbar(at, values, yerr=[2 * error for error in errors], marker="o", markersize=4, capsize=2, **style)


def _number(value: Value) -> float:
    return float(value) if isinstance(value, float) else 0.0


def _label(left: Axes, middle: Axes, right: Axes, layers: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    left.axhline(0, color=GREY, linewidth=1)
    left.plot([], [], "^", color=GREY, label="mean of the other routes")
    left.plot([], [], "v", color=GREY, label="best route tried")
    layer_ticks(left.xaxis, layers, 12)
    left.set(xlabel="MoE layer", ylabel="loss − loss on the route taken / nats")
    middle.set_xticks(range(1, QUARTERS + 1), ["lowest", "2", "3", "highest"])
    middle.set(xlabel="quarter of the tokens, by loss", ylabel="regret / nats, ±2 standard errors")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set(xlabel="routes tried, the one taken included", ylabel="regret / nats")
    for axis in (middle, right):
        axis.set_ylim(bottom=0)
