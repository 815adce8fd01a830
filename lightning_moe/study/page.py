"""The page of a study: tables and figures of its finished runs."""

from __future__ import annotations

import math
from pathlib import Path

from lightning_moe.atomic import check_writable, write_atomically
from lightning_moe.compare import report
from lightning_moe.errors import UserError
from lightning_moe.metrics.catalogue import shown_in
from lightning_moe.report.tables import markdown_table
from lightning_moe.study.figures import figures
from lightning_moe.study.results import TAIL, Results
from lightning_moe.study.spec import Study, spelled
from lightning_moe.tracking.files import LONGEST_TAG

BEGIN, END = "<!-- {name}: begin, written by `study` -->", "<!-- {name}: end -->"
METRICS = shown_in("study")
ALT = {
    "comparison": "Validation loss of each method, and its difference to the baseline",
    "tuning": "Validation loss over the tuned value",
    "training": "Training loss minus the baseline's",
}
CAUTION = (
    "Each interval is for its comparison alone, and takes the tuned values as given. One run per value chooses them, "
    "which is noisy, so where methods do not differ, an interval excludes 0 more often than once in twenty "
    "(`docs/study.md`: up to 16% of the time with five seeds). All differences are to the same runs of the baseline, "
    "so they err together. What excludes 0 here is a hint that new seeds have to confirm."
)


def write_page(results: Results, page: Path) -> list[Path]:
    """Write the page, its figures beside it under ``images/``, and the table as CSV in the study's folder.

    Args:
        results: results of the study.
        page: Markdown file. If it exists, the part between the study's two markers is replaced and the rest kept.

    Returns:
        The written files.

    Raises:
        UserError: the page has no markers.
    """
    study = results.study
    before, after = check_page(study, page)
    written = []
    for name, image in figures(results).items():
        path = page.parent / "images" / f"{study.name}_{name}.png"
        write_atomically(path, image)
        written.append(path)
    table = study.folder / "results.csv"
    write_atomically(table, report.comma_separated(results.rows).encode())
    body = markdown(results, {path.stem.removeprefix(f"{study.name}_"): f"images/{path.name}" for path in written})
    begin, end = _markers(study)
    write_atomically(page, f"{before}{begin}\n\n{body}\n{end}{after}".encode())
    return [page, table, *written]


def check_page(study: Study, page: Path) -> tuple[str, str]:
    """Return the text before and after the study's part; if there is no page yet, nothing and a line's end.

    Raises:
        UserError: the page does not have the two markers, or cannot be read or written.
    """
    try:
        check_writable(page.parent)
        text = page.read_text(encoding="utf-8") if page.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{page}: cannot be used as the page: {error}") from None
    if text is None:
        return "", "\n"
    begin, end = _markers(study)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"{page}: has not the lines {begin!r} and {end!r}, between which the results go")
    return text[: text.index(begin)], text[text.index(end) + len(end) :]


def _markers(study: Study) -> tuple[str, str]:
    return BEGIN.format(name=study.name), END.format(name=study.name)


def markdown(results: Results, images: dict[str, str]) -> str:
    """Return the results as Markdown.

    Args:
        results: results of the study.
        images: name of a figure → its address for the page.
    """
    parts = [_header(results), _picture("comparison", images), _methods(results)]
    parts += [_picture("training", images), _tuning(results), _picture("tuning", images)]
    parts += [_reference(results), _seeds(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def description(results: Results) -> str:
    """Return the results without pictures as Markdown: the description of the study's run in MLflow.

    The table of the methods comes first, because MLflow's page shows the first lines only. MLflow cuts a long
    description, so of the other tables only those that fit as a whole follow.
    """
    text = f"{_methods(results)}\n\n{_header(results)}"
    for part in (_tuning(results), _reference(results), _seeds(results)):
        if part and len(f"{text}\n\n{part}\n") <= LONGEST_TAG:
            text += f"\n\n{part}"
    return f"{text}\n"


def _picture(name: str, images: dict[str, str]) -> str:
    return f"![{ALT[name]}]({images[name]})" if name in images else ""


def _header(results: Results) -> str:
    study, one, recorded = results.study, results.example, results.provenance
    data = one["data"]
    commits = [commit[:7] for commit in recorded.get("git_commit", [])]
    dirty = " (with uncommitted changes)" if "true" in recorded.get("git_dirty", []) else ""
    versions = ", ".join(
        f"{name.removeprefix('version.')} {'/'.join(values)}"
        for name, values in recorded.items()
        if name in ("version.python", "version.torch", "version.lightning")
    )
    config = next(iter(results.baseline.runs.values())).config
    limit = config["trainer"].get("limit_val_batches")
    limited = "" if limit in (None, 1.0) else f", of these trainer.limit_val_batches={limit}"
    seeds = ", ".join(map(str, study.seeds))
    flags = "".join(f" --config {config}" for config in study.configs)
    flags += f" --name {study.name}" if study.name != study.path.stem else ""
    lines = [
        f"`python -m lightning_moe study {study.path}{flags}` at {', '.join(commits) or 'no commit'}{dirty}; "
        f"{'; '.join(recorded.get('device', []))}; {versions}; precision {config['trainer'].get('precision')}.",
        f"Each run: {one['total_parameters'] / 1e6:.2f}M parameters ({one['active_parameters'] / 1e6:.2f}M active), "
        f"{one['train_tokens']:,} tokens of {data['corpus']} in {one['steps']} steps (vocabulary {data['vocab_size']}, "
        f"sequences of {data['sequence_length']}); validated on {data['validation_documents']} documents, "
        f"{data['validation_tokens']:,} tokens{limited}. "
        f"Tuned with seed {study.tuning.seed}, compared with seeds {seeds}.",
    ]
    if results.missing:
        lines.append(f"**Not complete: {results.missing} of the compared runs are missing.**")
    if results.diverged:
        lines.append(f"Diverged: {', '.join(results.diverged)}.")
    if results.left_out:
        lines.append(f"Not compared, as every tuned value diverged: {', '.join(results.left_out)}.")
    return "\n\n".join(lines)


def _methods(results: Results) -> str:
    key = results.study.tuning.key
    titles = ["method", f"`{key.rpartition('.')[2]}`", "seeds", *report.headings(METRICS)]
    table = [[*titles, "val − train loss", f"Δ val loss to {results.baseline.label}", "interval excludes 0"]]
    for row in results.rows:
        method = results.study.methods[row.group.label]
        cells = [method.name, spelled(results.tuned[method.tuned_as]), str(len(row.group.runs))]
        cells += [*report.estimate_cells(row, METRICS), report.cell(results.gaps[method.name], "+.3f")]
        cells += ["baseline", ""] if row.group is results.baseline else report.difference_cells(row.difference)
        table.append(cells)
    return (
        f"{markdown_table(table)}\n\n"
        "Mean over seeds ± half of its 95% interval (Student's t); a single run has none. Mean fanout: routed experts "
        "per token, mean over layers; max/mean load: the busiest expert of the worst layer; both on validation text. "
        f"Train loss: mean over the last {TAIL:.0%} of the steps (other text than that of validation, so the gap is "
        "not the routing's alone). Δ: minus the run of the baseline with the same seed; below 0 is better. "
        f"{CAUTION} All runs are validated on the same documents: the intervals do not cover "
        "the choice of these."
    )


def _tuning(results: Results) -> str:
    values = results.study.tuning.values
    variants = not all(method.is_tuned for method in results.study.methods.values())
    others = "; a variant takes the value of its method" if variants else ""
    table = [["method", *map(spelled, values)]]
    at_edge = []
    for name, losses in results.tuning.items():
        best = results.tuned.get(name)
        cells = []
        for value in values:
            loss = losses.get(value)
            text = "–" if loss is None else "diverged" if math.isinf(loss) else f"{loss:.4f}"
            cells.append(f"**{text}**" if value == best else text)
        table.append([name, *cells])
        at_edge += [name] if best in (values[0], values[-1]) else []
    lines = [f"Validation loss by `{results.study.tuning.key}` (one run each; the best in bold{others}):", ""]
    lines.append(markdown_table(table))
    if at_edge:
        lines += ["", f"At the edge of the tuned range, so perhaps better beyond it: {', '.join(at_edge)}."]
    return "\n".join(lines)


def _reference(results: Results) -> str:
    reference = results.study.reference
    base = None if reference is None else reference.loss.get(results.baseline.label)
    if reference is None or base is None:
        return ""
    table = [["method", "here", "published"]]
    for row in results.rows:
        published = reference.loss.get(row.group.label)
        if published is not None and row.group is not results.baseline:
            table.append([row.group.label, report.cell(row.difference, "+.4f"), f"{published - base:+.3f}"])
    caption = f"Beside {reference.source}: difference of the loss to {results.baseline.label}, nats per token."
    return f"{caption}\n\n{markdown_table(table)}"


def _seeds(results: Results) -> str:
    seeds = results.study.seeds
    table = [["method", *map(str, seeds)]]
    for row in results.rows:
        losses = row.group.values("loss")
        table.append([row.group.label, *(f"{losses[seed]:.4f}" if seed in losses else "–" for seed in seeds)])
    return f"Validation loss of each run, by seed:\n\n{markdown_table(table)}"
