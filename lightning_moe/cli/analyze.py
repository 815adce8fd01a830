"""``analyze``: the routers of one or several checkpoints in numbers, figures and one HTML report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_moe.cli.arguments import (
    add_checkpoint_or_model,
    add_shared,
    at_least,
    command_parser,
    named_path,
    real_number,
    refuse_unwritable,
)
from lightning_moe.cli.text_of_released import domains_for, file_domains
from lightning_moe.errors import UserError
from lightning_moe.trust import stays_inside

if TYPE_CHECKING:
    from lightning_moe.analysis.collect import Subject
    from lightning_moe.analysis.run import Origin
    from lightning_moe.analysis.text import Domain
    from lightning_moe.data import Tokenizer
    from lightning_moe.runs.released import Released

DESCRIPTION = """\
Run checkpoints or released models over text and report what their routers do: which tokens get compute, fanout by
position and by loss, load of the experts and their specialisation by domain, cutoff against usage, router logits with
their thresholds, how far two checkpoints route alike, the loss with fewer or more experts per token and with smaller or
larger routing pools. The record of each checkpoint's run adds its train-eval gap, warm-up and capacity. The report
begins with a summary.

The command writes report.html (self-contained), analysis.json, numbers/*.csv and figures/*.png, and attaches them to
the MLflow runs that the checkpoints come from.

Text: the validation text of the first checkpoint's run, by domain (code and prose of the default corpus), and the files
of --text, each a domain of its own; with --tokenizer, these files only. For released models: --text or, without it,
the validation text of the default corpus."""

DEFAULT_MAX_TOKENS = 32768
DEFAULT_SEQUENCE_LENGTH = 512  # of released models, whose context may be very long


def run(command: str, args: list[str]) -> None:
    """Analyse, write the folder, and print where the report is.

    Raises:
        UserError: checkpoints, text or folder cannot be used.
        SystemExit: code 2 on unknown options, 0 after ``--help``.
    """
    options = _parser(command).parse_args(args)
    from tqdm import tqdm

    from lightning_moe.analysis.collect import collect
    from lightning_moe.analysis.findings import summary
    from lightning_moe.analysis.report import REPORT_FILE, check_output, write_report
    from lightning_moe.analysis.run import check_comparable, facts, sections
    from lightning_moe.analysis.text import batches
    from lightning_moe.training.quiet import quiet

    quiet()
    released = _open_released(options) if options.model else None
    subjects, origins = _load(options.ckpt_path, options.device) if released is None else _subjects(released)
    check_comparable(subjects)
    folder = _folder(options.output_dir, origins)
    check_output(folder, options.overwrite)
    refuse_unwritable(folder)
    if released is None:
        tokenizer, domains = _text(options.text, options.tokenizer, list(origins.values()))
    else:
        first = next(iter(released.values()))
        tokenizer, domains = first.tokenizer, domains_for(options.text, first.tokenizer, first.lm.max_sequence_length)
    contexts = {subject.label: subject.decoder.max_sequence_length for subject in subjects}
    length = options.sequence_length or min(contexts.values())
    if length > min(contexts.values()):
        raise UserError(f"--sequence_length {length}: the model's context is {min(contexts.values())}.")
    max_tokens = options.max_tokens or None
    pools = _pools(options.pools, options.batch_size)
    with tqdm(desc="Analysing", unit=" tokens", unit_scale=True, disable=None, leave=False) as bar:
        bar.total = max_tokens and max_tokens * len(domains)
        stream = batches(domains, length, options.batch_size, max_tokens)
        collected = collect(
            subjects,
            stream,
            len(domains),
            length,
            tokenizer.token_bytes,
            tokenizer.end_of_text_id,
            options.compare_num_experts_per_token,
            pools,
            options.batch_size,
            bar.update,
        )
    names = [domain.name for domain in domains]
    parts = sections(subjects, origins, collected, names, tokenizer, length)
    sizes = {s.label: s.decoder.size for s in subjects}
    parameters = {label: (size.total_parameters, size.active_parameters) for label, size in sizes.items()}
    tables = facts(subjects, origins, collected, [(d.name, d.source) for d in domains], parameters)
    found = summary(subjects, collected.measurements, names)
    try:
        files = write_report(folder, "Routing analysis: " + " · ".join(origins), found, tables, parts)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written: {error}") from error
    if not options.no_mlflow:
        _attach(folder, files, list(origins.values()))
    print(f"{len(files)} files in {folder}\nreport: {folder / REPORT_FILE}")


def _parser(command: str) -> argparse.ArgumentParser:
    parser = command_parser(command, DESCRIPTION)
    add_checkpoint_or_model(parser, "; may be given several times", action="append", metavar="[NAME=]PATH")
    add_shared(
        parser,
        "--text",
        ", or .jsonl, .parquet, a folder or a glob, beside the run's; may be given several times",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
    )
    add_shared(parser, "--tokenizer")
    add_shared(parser, "--max_tokens", ", of each domain", default=DEFAULT_MAX_TOKENS)
    add_shared(parser, "--sequence_length", " (default: the context; 512 with --model)")
    add_shared(parser, "--batch_size", default=8)
    parser.add_argument(
        "--compare_num_experts_per_token",
        type=real_number(0, open_low=True),
        nargs="*",
        metavar="K",
        help="also measure the loss at so many routed experts per token, means over the MoE layers; each costs a pass "
        "over the text (default: a quarter, half, twice and four times what a checkpoint was trained for)",
    )
    parser.add_argument(
        "--pools",
        type=at_least(1),
        nargs="*",
        metavar="N",
        help="also measure the loss with experts choosing among so many windows; each costs a pass over the text "
        "(default: 1, 2, 4, … up to the batch size)",
    )
    add_shared(parser, "--output_dir", " (default: analysis/ in the checkpoints' run, or in the working directory)")
    add_shared(parser, "--overwrite")
    add_shared(parser, "--no_mlflow")
    add_shared(parser, "--device")
    return parser


def _pools(asked: Sequence[int] | None, batch_size: int) -> list[int]:
    if asked is None:
        return [size for size in (2**power for power in range(batch_size.bit_length())) if batch_size % size == 0]
    for size in asked:
        if batch_size % size:
            raise UserError(f"--pools {size}: must divide --batch_size {batch_size}.")
    return list(asked)


def _load(arguments: Sequence[str], device: str) -> tuple[list[Subject], dict[str, Origin]]:
    """Load the checkpoints; one without a name is called by run and step."""
    from lightning_moe.analysis.collect import Subject
    from lightning_moe.analysis.run import Origin
    from lightning_moe.analysis.training_record import training_phase
    from lightning_moe.checkpoints.read import read_verified
    from lightning_moe.module import LanguageModel
    from lightning_moe.runs.folder import run_of_checkpoint
    from lightning_moe.runs.loading import rule_name, to_device, tokenizer_fingerprint

    subjects: list[Subject] = []
    origins: dict[str, Origin] = {}
    tokenizers: dict[str, str] = {}
    for argument in arguments:
        name, file = named_path("--ckpt_path", argument)
        path = Path(file)
        checkpoint = read_verified(path)
        decoder = to_device(LanguageModel.from_checkpoint(checkpoint, str(path)), device).decoder
        run_dir, step = run_of_checkpoint(path), int(checkpoint.get("global_step", 0))
        label = name or f"{run_dir.resolve().name if run_dir else path.stem}, step {step}"
        if label in origins:
            raise UserError(f"--ckpt_path: two checkpoints are called {label!r}; give names: --ckpt_path NAME=PATH.")
        light = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
        origins[label] = Origin(path, rule_name(checkpoint), step, run_dir, light)
        subjects.append(Subject(label, decoder, training_phase(checkpoint)))
        tokenizers[label] = f"{tokenizer_fingerprint(checkpoint)} ({decoder.vocab_size} tokens)"
    if len(set(tokenizers.values())) > 1:
        found = "; ".join(f"{label}: {fingerprint}" for label, fingerprint in tokenizers.items())
        raise UserError(
            f"the checkpoints have different tokenizers ({found}), so they do not see the same tokens and cannot be "
            "compared: analyse each by itself."
        )
    return subjects, origins


def _open_released(options: argparse.Namespace) -> dict[str, Released]:
    """Load the released models by label; one without a name is called by its folder."""
    from lightning_moe.runs.released import open_released

    found: dict[str, Released] = {}
    for argument in options.model:
        name, path = named_path("--model", argument)
        label = name or Path(path).name
        if label in found:
            raise UserError(f"--model: two models are called {label!r}; give names: --model NAME={path}.")
        found[label] = open_released(path, options, options.sequence_length or DEFAULT_SEQUENCE_LENGTH)
    different = {released.tokenizer.fingerprint: label for label, released in found.items()}
    if len(different) > 1:
        raise UserError(
            f"the models have different tokenizers ({', '.join(different.values())} among them), so they do not see "
            "the same tokens and cannot be compared: analyse each by itself."
        )
    return found


def _subjects(found: dict[str, Released]) -> tuple[list[Subject], dict[str, Origin]]:
    from lightning_moe.analysis.collect import Subject
    from lightning_moe.analysis.run import RELEASED, Origin
    from lightning_moe.hf import ReleasedTopK

    subjects = [Subject(label, released.lm) for label, released in found.items()]
    origins = {}
    for subject in subjects:
        rule = "released top-k" if isinstance(subject.rule, ReleasedTopK) else type(subject.rule).__name__
        origins[subject.label] = Origin(Path(found[subject.label].name), rule, RELEASED, None, {})
    return subjects, origins


def _folder(output_dir: Path | None, origins: dict[str, Origin]) -> Path:
    runs = {origin.run_dir for origin in origins.values()}
    if output_dir is not None:
        return output_dir
    only = runs.pop() if len(runs) == 1 else None
    if only is not None and not stays_inside(only, "analysis"):
        raise UserError(f"{only / 'analysis'}: is a link out of the run's folder; give --output_dir")
    return Path("analysis") if only is None else only / "analysis"


def _text(
    arguments: Sequence[str], tokenizer_file: str | None, origins: list[Origin]
) -> tuple[Tokenizer, list[Domain]]:
    """Return the tokenizer and the domains."""
    from lightning_moe.analysis.text import held_out_domains
    from lightning_moe.runs.loading import check_tokenizer, text_source

    tokenizer, data = text_source(origins[0].path, origins[0].checkpoint, tokenizer_file, bool(arguments))
    domains = [] if data is None else held_out_domains(data)
    for origin in origins:
        check_tokenizer(tokenizer, dict(origin.checkpoint), "--tokenizer, and --text")
    return tokenizer, file_domains(arguments, tokenizer, domains)


def _attach(folder: Path, files: Sequence[Path], origins: Sequence[Origin]) -> None:
    """Copy the files into the MLflow run of every checkpoint that has one, if the store can be reached."""
    from lightning_moe.analysis.publish import attach

    for run_dir in dict.fromkeys(origin.run_dir for origin in origins):
        if run_dir is not None:
            print(attach(run_dir, folder, files))
