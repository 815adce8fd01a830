"""The report: one HTML file that needs nothing else, and the folder of numbers and figures beside it."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_moe.analysis.findings import Summary
from lightning_moe.analysis.section import Row, Section, Value
from lightning_moe.atomic import write_atomically
from lightning_moe.errors import UserError
from lightning_moe.report.figures import RESOLUTION, png
from lightning_moe.report.tables import csv_table, json_numbers

REPORT_FILE = "report.html"
RESULTS_FILE = "analysis.json"
SHOWN_RESOLUTION = 104  # of the browser's pixels, so that text has the same size in all figures

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1200px; margin: 2rem auto;
  padding: 0 1.5rem; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.25rem; margin-top: 2.6rem; border-top: 1px solid #ccc; padding-top: 1.2rem; }
h4 { margin: 1.2rem 0 .2rem; font-weight: 600; }
code { background: #f2f2f2; padding: .1em .3em; }
img { max-width: 100%; height: auto; display: block; margin: .8rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; margin: .8rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th { border-bottom: 2px solid #888; vertical-align: bottom; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td:first-child { white-space: nowrap; }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; }
.missing { background: #f4f1e6; border-left: 4px solid #b8860b; padding: .4rem .9rem; margin: .8rem 0; }
.files, .legend { color: #555; font-size: .85rem; }
nav a { margin-right: 1rem; }
pre.passage { white-space: pre-wrap; font: 13px/1.75 ui-monospace, monospace; border: 1px solid #ddd; padding: .7rem; }
pre.passage span { position: relative; padding: .1em 0; }
pre.passage span:hover { outline: 2px solid #d55e00; z-index: 2; }
pre.passage span:hover::after { content: attr(data-tip); position: absolute; left: 0; top: 1.6em; z-index: 3;
  white-space: pre; background: #fff; color: #000; border: 1px solid #444; padding: .35rem .6rem; font-size: 12px;
  line-height: 1.45; box-shadow: 0 2px 8px #0004; }
"""
#: cividis, ten steps; white text on the dark half
LEVELS = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838")


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that already holds something, unless it may be overwritten.

    Raises:
        UserError: it exists and is not empty, or is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: is a file; name a folder.")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--output_dir {folder}: exists and is not empty; nothing is overwritten without --overwrite.")


def write_report(
    folder: Path, title: str, summary: Summary, facts: Mapping[str, Sequence[Row]], sections: Sequence[Section]
) -> list[Path]:
    """Write ``report.html``, ``analysis.json``, ``numbers/*.csv`` and ``figures/*.png``; other files stay.

    Args:
        folder: folder of the report; it is made if it is missing.
        title: title of the report.
        summary: main findings, with which the report begins.
        facts: tables after the summary, by their captions.
        sections: diagnostics.

    Returns:
        The files, with the report first.
    """
    files: dict[str, bytes] = {}
    images: dict[str, bytes] = {}
    for section in sections:
        for name, rows in section.tables.items():
            files[f"numbers/{name}.csv"] = csv_table(rows).encode()
        for name, figure in section.figures.items():
            images[name] = files[f"figures/{name}.png"] = png(figure)
    page = _page(title, summary, facts, sections, images)
    files = {REPORT_FILE: page.encode(), RESULTS_FILE: _results(summary, facts, sections), **files}
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def _results(summary: Summary, facts: Mapping[str, Sequence[Row]], sections: Sequence[Section]) -> bytes:
    content: dict[str, Any] = {
        "summary": {
            "sentences": [sentence.text for sentence in summary.sentences],
            "findings": [vars(finding) for finding in summary.table],
        }
    }
    content["facts"] = {name: list(rows) for name, rows in facts.items()}
    for section in sections:
        content[section.name] = {"summary": list(section.summary), "missing": list(section.missing)}
    return (json.dumps(json_numbers(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _page(
    title: str,
    summary: Summary,
    facts: Mapping[str, Sequence[Row]],
    sections: Sequence[Section],
    images: Mapping[str, bytes],
) -> str:
    colors = "\n".join(
        f".f{level} {{ background: {color}; color: {'#fff' if level < 5 else '#000'}; }}"
        for level, color in enumerate(LEVELS)
    )
    links = "\n".join(f'<a href="#{section.name}">{html.escape(section.title)}</a>' for section in sections)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{html.escape(title)}</title><style>{STYLE}{colors}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        _findings(summary, {section.name: section.title for section in sections}),
        *(f"<h4>{html.escape(caption)}</h4>{_table(rows)}" for caption, rows in facts.items()),
        f"<nav>{links}</nav>",
        *(_section(section, images) for section in sections),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _findings(summary: Summary, titles: Mapping[str, str]) -> str:
    """Return the sentences and the table of the summary, with links to the sections that show more."""

    def link(text: str, section: str) -> str:
        return f'<a href="#{section}">{html.escape(text)}</a>' if section in titles else html.escape(text)

    parts = ['<h2 id="summary">Summary</h2>', "<ul>"]
    for sentence in summary.sentences:
        more = f" ({link(titles[sentence.section], sentence.section)})" if sentence.section in titles else ""
        parts.append(f"<li>{html.escape(sentence.text)}{more}</li>")
    parts.append("</ul>")
    labels = list(summary.table[0].values) if summary.table else []
    head = "".join(f"<th>{html.escape(label)}</th>" for label in labels)
    lines = [
        f"<td>{link(row.text, row.section)}</td>"
        + "".join(f"<td>{cell}</td>" for cell in _cells(list(row.values.values())))
        for row in summary.table
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    parts.append(
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
    return "\n".join(parts)


def _section(section: Section, images: Mapping[str, bytes]) -> str:
    parts = [f'<h2 id="{section.name}">{html.escape(section.title)}</h2>', section.text]
    parts += [f'<p class="missing">Not shown: {html.escape(note)}</p>' for note in _together(section.missing)]
    for name in section.figures:
        data = base64.b64encode(images[name]).decode()
        width = int.from_bytes(images[name][16:20], "big") * SHOWN_RESOLUTION // RESOLUTION  # of a PNG's header
        alt = html.escape(section.title)
        parts.append(f'<img alt="{alt}" style="width: {width}px" src="data:image/png;base64,{data}">')
    parts.append(_table(section.summary))
    if section.tables:
        names = ", ".join(f"numbers/{name}.csv" for name in section.tables)
        parts.append(f'<p class="files">All numbers: {names}</p>')
    parts.append(section.html)
    return "\n".join(part for part in parts if part)


def _together(notes: Sequence[str]) -> list[str]:
    """Merge notes ``name: reason`` that have the same reason."""
    names: dict[str, list[str]] = {}
    for note in notes:
        name, colon, reason = note.partition(": ")
        names.setdefault(reason if colon else name, []).extend([name] if colon else [])
    return [f"{'; '.join(found)}: {reason}" if found else reason for reason, found in names.items()]


def _table(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = {name for name in columns if all(isinstance(row.get(name), str | None) for row in rows)}
    kinds = {name: ' class="text"' if name in text else "" for name in columns}
    head = "".join(f"<th{kind}>{html.escape(name)}</th>" for name, kind in kinds.items())
    shown = {name: _cells([row.get(name) for row in rows]) for name in columns}
    lines = ("".join(f"<td{kind}>{shown[name][i]}</td>" for name, kind in kinds.items()) for i in range(len(rows)))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(values: Sequence[Value]) -> list[str]:
    """Format a column: its numbers have the same decimals, with four digits for the largest."""
    numbers = [v for v in values if isinstance(v, float) and math.isfinite(v)]
    largest = max(map(abs, numbers), default=0.0)
    decimals = 0 if largest == 0 else min(6, max(0, 3 - math.floor(math.log10(largest))))
    while decimals and all(round(v, decimals) == round(v, decimals - 1) for v in numbers):
        decimals -= 1
    return [_cell(value, decimals) for value in values]


def _cell(value: Value, decimals: int) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return html.escape(str(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{decimals}f}"
