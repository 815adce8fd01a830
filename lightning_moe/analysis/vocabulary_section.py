"""The report's section on vocabulary specialisation."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from lightning_moe.analysis.intensity import spelled
from lightning_moe.analysis.section import Row, Section
from lightning_moe.analysis.vocabulary import KINDS, Entry, Mean, Vocabulary
from lightning_moe.data import Tokenizer
from lightning_moe.report.figures import COLORS, GREY, layer_ticks, panel_grid, shared_legend, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS_IN_A_ROW = 3
SHOWN, KEPT = 8, 20  # token ids of an expert in the report, and in the numbers
NAMES = {"input": "input token", "next": "next token", "predicted": "predicted token"}

TEXT = """\
<p>Which token ids an expert serves. The specialisation of a token id is the share of its occurrences that go to one and
the same expert of a layer, the most common one; of a token's experts only the first counts, that with the largest gate.
The figure has its mean over the ids that occur at least 10 times, for three ids of a position: the token itself, the
token that follows in the text, and the token that the model predicts. Dotted: the same if the experts were dealt out
without regard to the ids, by their loads alone. A router high above its dotted line for the input routes by what the
token is. One that is higher for the predicted token than for the next one routes by what the model is about to say, as
the upper layers of OLMoE do. The table also has the mean over all ids, which is OLMoE's number; there every id that
occurs once counts as fully specialised, so compare it between texts of equal length only.</p>
<p>The lists below name, for each expert, its most typical token ids (with the share of the id's occurrences that took
the expert, ids with at least 10 occurrences) and its most frequent ones (with their share of the expert's tokens).
There all experts of a token count.</p>
<p><code>specialisation(x) = max_i N_{x,i} / N_x</code> with N_x occurrences of x, N_{x,i} of them with the first expert
i.</p>"""


def section(results: Mapping[str, Vocabulary], layers: Sequence[str], tokenizer: Tokenizer) -> Section:
    """Make the section of the report.

    Args:
        results: label → counts, of checkpoints with the same layers.
        layers: names of the layers.
        tokenizer: source of the text of the tokens.
    """
    name = "vocabulary"
    means: list[Row] = []
    entries: list[Row] = []
    parts: list[str] = []
    missing: list[str] = []
    found = {label: _means(result, layers) for label, result in results.items()}
    for label, result in results.items():
        if not any(kind == "predicted" for kind, _ in found[label]):
            missing.append(f"{label}: the model does not say which token it predicts.")
        means += [
            {"checkpoint": label, "layer": layers[layer], "ids": NAMES[kind], **asdict(mean)}
            for (kind, layer), mean in found[label].items()
        ]
        of_experts = result.entries(KEPT)
        entries += _rows(label, of_experts, layers, tokenizer)
        parts += _lists(label, of_experts, layers, tokenizer)
    summary = [_summary(label, layers[layer], layer, found[label]) for label in results for layer in range(len(layers))]
    tables = {name: means, "vocabulary_of_experts": entries}
    figures = {name: _figure(found, layers)}
    title = "Vocabulary specialisation"
    return Section(name, title, TEXT, tables, figures, html="\n".join(parts), summary=summary, missing=missing)


def _means(result: Vocabulary, layers: Sequence[str]) -> dict[tuple[str, int], Mean]:
    found = {(kind, layer): result.mean(kind, layer) for layer in range(len(layers)) for kind in KINDS}
    return {place: mean for place, mean in found.items() if mean is not None}


def _summary(label: str, name: str, layer: int, means: Mapping[tuple[str, int], Mean]) -> Row:
    row: dict[str, str | float | None] = {"checkpoint": label, "layer": name}
    for kind in KINDS:
        mean = means.get((kind, layer))
        row[NAMES[kind]] = None if mean is None else mean.value
        row[f"{NAMES[kind]}, by chance"] = None if mean is None else mean.by_chance
        row[f"{NAMES[kind]}, all ids"] = None if mean is None else mean.of_all
    return row


def _rows(
    label: str,
    of_experts: Mapping[tuple[int, int], tuple[list[Entry], list[Entry]]],
    layers: Sequence[str],
    tokenizer: Tokenizer,
) -> list[Row]:
    return [
        {
            "checkpoint": label,
            "layer": layers[layer],
            "expert": expert,
            "list": kind,
            "token": entry.token,
            "text": spelled(tokenizer, entry.token),
            "count": entry.count,
            "share_of_expert": entry.of_expert,
            "share_of_token": entry.of_token,
        }
        for (layer, expert), lists in of_experts.items()
        for kind, mine in zip(("typical", "frequent"), lists, strict=True)
        for entry in mine
    ]


def _lists(
    label: str,
    of_experts: Mapping[tuple[int, int], tuple[list[Entry], list[Entry]]],
    layers: Sequence[str],
    tokenizer: Tokenizer,
) -> list[str]:
    """Return a folded table of the experts' token ids for each layer."""
    parts = []
    for layer, name in enumerate(layers):
        lines = [
            f"<tr><td>{expert}</td><td class='text'>{_words(typical, 'of_token', tokenizer)}</td>"
            f"<td class='text'>{_words(frequent, 'of_expert', tokenizer)}</td></tr>"
            for (of_layer, expert), (typical, frequent) in of_experts.items()
            if of_layer == layer
        ]
        heading = html.escape(f"{label} · {name}")
        head = "<th>expert</th><th class='text'>most typical</th><th class='text'>most frequent</th>"
        parts.append(
            f"<details><summary>Tokens of the experts: {heading}</summary><div class='scroll'><table><thead><tr>{head}"
            f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div></details>"
        )
    return parts


def _words(entries: Sequence[Entry], share: str, tokenizer: Tokenizer) -> str:
    return " ".join(
        f"<code>{html.escape(spelled(tokenizer, entry.token))}</code>&nbsp;{getattr(entry, share):.0%}"
        for entry in entries[:SHOWN]
    )


def _figure(found: Mapping[str, Mapping[tuple[str, int], Mean]], layers: Sequence[str]) -> Figure:
    figure, axes = panel_grid(len(found), PANELS_IN_A_ROW, max(3.4, min(0.14 * len(layers) + 2, 6)), 2.9)
    for axis, (label, means) in zip(axes, found.items(), strict=True):
        for kind, color in zip(KINDS, COLORS, strict=False):
            at = [layer for layer in range(len(layers)) if (kind, layer) in means]
            values = [means[kind, layer].value for layer in at]
            axis.plot(at, values, marker="o", markersize=4, color=color, label=NAMES[kind])
            chance = [means[kind, layer].by_chance for layer in at]
            axis.plot(at, chance, marker=".", markersize=4, color=color, linestyle=":")
        axis.plot([], [], color=GREY, linestyle=":", label="by chance")
        axis.set_title(wrapped(label, 34))
        axis.set_ylim(0, 1.02)
        layer_ticks(axis.xaxis, layers, most=12)
        axis.set_xlabel("layer")
        axis.set_ylabel("mean specialisation")
    shared_legend(figure, right=True)
    return figure
