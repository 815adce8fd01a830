"""Token activation intensity (the paper's Figs. 4a, 19–21): which tokens get compute."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_moe.analysis.observe import Observation
from lightning_moe.analysis.section import Row, Section
from lightning_moe.data import Tokenizer
from lightning_moe.report.axes import share_limits
from lightning_moe.report.figures import COLORS, GREY, panel_grid, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS_IN_A_ROW = 3
MOST_TOKENS_SHOWN = 15  # at either end of the figure
FEWEST_OCCURRENCES = 20

TEXT = """\
<p>How many routed experts each token takes, summed over layers. The figure ranks the tokens of the vocabulary that
occur often enough by their mean; below it are passages, one of each domain (the first window of its text), coloured
from dark (no expert) to light (twice the target or more; of several targets, the highest). All checkpoints share axes
and colours. Hover over a token to see its experts in every layer and
the loss of the prediction that follows it.</p>
<p><code>fanout_t = Σ_l Σ_i z_{t,l,i}</code>; the shared expert is not counted.</p>"""


@dataclass(frozen=True)
class Passage:
    """A window of text.

    Args:
        tokens: int64 [S].
        loss: fp32 [S], nats.
        experts: bool [S, L, E].
    """

    tokens: Tensor
    loss: Tensor
    experts: Tensor


class Intensity:
    """The fanout per entry of the vocabulary, and the first window of each domain.

    Args:
        vocab_size: number of tokens of the tokenizer.
    """

    def __init__(self, vocab_size: int) -> None:
        self.count = torch.zeros(vocab_size, dtype=torch.int64)
        self.fanout = torch.zeros(vocab_size, dtype=torch.int64)  # summed over layers and occurrences
        self.passages: dict[int, Passage] = {}  # by domain

    def update(self, seen: Observation) -> None:
        """Add a batch."""
        for row, domain in enumerate(seen.domains.tolist()):
            if domain not in self.passages:
                kept = seen.valid[row]
                self.passages[domain] = Passage(
                    seen.tokens[row][kept], seen.loss[row][kept].clone(), seen.experts[row][kept].clone()
                )
        tokens = seen.tokens[seen.valid]
        self.count += torch.bincount(tokens, minlength=len(self.count))
        self.fanout.index_add_(0, tokens, seen.experts.sum((-2, -1))[seen.valid])

    def ranked(self) -> list[tuple[int, int, float]]:
        """Return (token, occurrences, mean fanout) of tokens with enough occurrences, highest first; ties by number."""
        fewest = min(FEWEST_OCCURRENCES, int(self.count.max()))
        tokens = (self.count >= max(1, fewest)).nonzero()[:, 0].tolist()
        entries = [
            (token, int(self.count[token]), int(self.fanout[token]) / int(self.count[token])) for token in tokens
        ]
        return sorted(entries, key=lambda entry: (-entry[2], entry[0]))


def section(
    results: Mapping[str, Intensity],
    domains: Sequence[str],
    layers: Sequence[str],
    targets: Mapping[str, float],
    tokenizer: Tokenizer,
) -> Section:
    """Make the section of the report, for several checkpoints with the same layers.

    Args:
        results: label → counts.
        domains: names of the domains.
        layers: names of the layers.
        targets: label → experts per token, summed over layers, that the checkpoint was trained for.
        tokenizer: source of the text of the tokens.
    """
    vocabulary: list[Row] = []
    passages: list[Row] = []
    parts: list[str] = []
    varying = {label: result for label, result in results.items() if _varies(result)}
    missing = [f"{label}: every token takes the same number of experts." for label in results if label not in varying]
    title, name = "Which tokens get compute", "intensity"
    if not varying:
        return Section(name, title, TEXT, missing=missing)
    highest = max(1, round(2 * max(targets[label] for label in varying)))
    figure, axes = panel_grid(len(varying), PANELS_IN_A_ROW, 3.6, 0.14 * 2 * MOST_TOKENS_SHOWN + 0.9)
    for axis, (label, result) in zip(axes, varying.items(), strict=True):
        ranked = result.ranked()
        vocabulary += [
            {"checkpoint": label, "token": token, "text": spelled(tokenizer, token), "count": n, "fanout_mean": mean}
            for token, n, mean in ranked
        ]
        _draw(axis, ranked, tokenizer, targets[label])
        axis.set_title(wrapped(label, 34))
        for index, passage in sorted(result.passages.items()):
            passages += _passage_rows(label, domains[index], passage, layers, tokenizer)
            heading = html.escape(f"{label} · {domains[index]}")
            colored = passage_html(passage, layers, targets[label], highest, tokenizer)
            opened = "" if parts else " open"
            parts.append(f"<details{opened}><summary>Passage: {heading}</summary>{colored}</details>")
    share_limits(axes, "x", margin=0.14)  # the numbers beside the bars
    tables = {"intensity_vocabulary": vocabulary, "intensity_passages": passages}
    return Section(name, title, TEXT, tables, {name: figure}, html="\n".join(parts), missing=missing)


def _varies(result: Intensity) -> bool:
    seen = result.count > 0
    means = result.fanout[seen].double() / result.count[seen]
    return bool(means.max() > means.min())


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text with invisible characters made visible."""
    if token == tokenizer.end_of_text_id:
        return "<|endoftext|>"
    text = tokenizer.decode_bytes([token]).decode(errors="replace")
    text = text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _short(text: str) -> str:
    """Shorten a text to at most a dozen characters, and write repetitions as a number."""
    if len(text) > 3 and len(set(text)) == 1:
        return f"{text[0]}·{len(text)}"
    return text if len(text) <= 12 else f"{text[:11]}…"


def _draw(axis: Axes, ranked: Sequence[tuple[int, int, float]], tokenizer: Tokenizer, target: float) -> None:
    half = MOST_TOKENS_SHOWN
    cut = len(ranked) > 2 * half
    shown = [*ranked[:half], *ranked[-half:]] if cut else list(ranked)
    places = [index + (index >= half and cut) for index in range(len(shown))]
    bars = axis.barh(places, [mean for *_, mean in shown], color=[COLORS[int(place >= half)] for place in places])
    plain = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
    axis.bar_label(bars, fmt="%.2f", fontsize=6, padding=2, bbox=plain)
    axis.margins(y=0.02)
    names = [f"{_short(spelled(tokenizer, token))}  ×{count}" for token, count, _ in shown]
    axis.set_yticks(places, [name.replace("$", r"\$") for name in names], fontsize=7, family="monospace")
    if cut:
        between = f" … {len(ranked) - 2 * half} tokens between"
        axis.text(0, half, between, va="center", fontsize=7, color=GREY, bbox=plain)
    axis.invert_yaxis()
    axis.axvline(target, color=GREY, linestyle=":", linewidth=1.2, zorder=0, label=f"target {target:g}")
    axis.legend(fontsize=7, loc="lower right")
    axis.set_xlabel("routed experts per occurrence,\nsummed over layers")


def _passage_rows(label: str, domain: str, passage: Passage, layers: Sequence[str], tokenizer: Tokenizer) -> list[Row]:
    return [
        {
            "checkpoint": label,
            "domain": domain,
            "position": position,
            "token": token,
            "text": spelled(tokenizer, token),
            "fanout": int(passage.experts[position].sum()),
            "loss": float(passage.loss[position]),
            **{layer: _numbers(passage.experts[position, number]) for number, layer in enumerate(layers)},
        }
        for position, token in enumerate(passage.tokens.tolist())
    ]


def _numbers(mask: Tensor) -> str:
    return " ".join(map(str, mask.nonzero()[:, 0].tolist()))


def passage_html(passage: Passage, layers: Sequence[str], target: float, highest: int, tokenizer: Tokenizer) -> str:
    """Return a passage as coloured spans, each with a tooltip, and its legend.

    Args:
        passage: passage to show.
        layers: names of the layers.
        target: experts per token, summed over layers, that the checkpoint was trained for.
        highest: experts per token from which on the colour is the lightest.
        tokenizer: source of the text of the tokens.
    """
    spans = []
    for position, token in enumerate(passage.tokens.tolist()):
        mask = passage.experts[position]
        fanout = int(mask.sum())
        text = tokenizer.decode_bytes([token]).decode(errors="replace") or spelled(tokenizer, token)
        experts = [f"{layer}: {_numbers(mask[number]) or 'none'}" for number, layer in enumerate(layers)]
        loss = f"next loss {float(passage.loss[position]):.2f} nats"
        tip = "\n".join([f"{spelled(tokenizer, token)}   {fanout} experts, {loss}", *experts])
        shown = html.escape(text.replace("\r", "")).replace("\n", "↵\n")
        level = round(9 * min(fanout, highest) / highest)
        spans.append(f'<span class="f{level}" data-tip="{html.escape(tip)}">{shown}</span>')
    marks = "".join(
        f'<span class="f{level}">&nbsp;{level * highest / 9:.3g}{"+" if level == 9 else ""}&nbsp;</span>'
        for level in (0, 3, 6, 9)
    )
    legend = f'<p class="legend">experts per token: {marks} target {target:g}</p>'
    return f'{legend}<pre class="passage">{"".join(spans)}</pre>'
