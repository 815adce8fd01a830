"""``compare``: finished runs side by side, with intervals over seeds."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

from lightning_moe.cli.arguments import add_shared, command_parser, home_path
from lightning_moe.errors import UserError

DESCRIPTION = """\
Put finished runs into groups that differ in their seed only, and print each group's scores: means over seeds with 95%
intervals, and with --baseline the difference to it, paired by seed. The page, a CSV file and a figure are saved and
logged to MLflow. Runs on other data, another tokenizer, another validation set or another budget are refused."""
ALLOWABLE = ("fingerprint", "tokenizer", "validation", "budget")


def run(command: str, args: list[str]) -> None:
    """Print and save the comparison.

    Raises:
        UserError: no runs, runs that cannot be compared, or a baseline that is none of them.
        SystemExit: code 2 on unknown options, 0 after ``--help``.
    """
    options = _parser(command).parse_args(args)
    if not options.runs and options.experiment_name is None:
        raise UserError("compare: give run folders, or --experiment_name with the name of an MLflow experiment")

    from lightning_moe.atomic import write_atomically
    from lightning_moe.compare import report
    from lightning_moe.compare.groups import check_comparable, find_group, group
    from lightning_moe.compare.runs import read_experiment, read_folders
    from lightning_moe.tracking.files import NOTE_TAG
    from lightning_moe.tracking.files_run import log_files
    from lightning_moe.tracking.store import resolve_uri

    uri = resolve_uri(options.tracking_uri)
    if options.runs:
        runs, unfinished = read_folders(options.runs)
    else:
        runs, unfinished = read_experiment(uri, options.experiment_name, options.filter)
    notes = [f"not finished, left out: {name}" for name in unfinished]
    if not runs:
        raise UserError(f"compare: no finished run found ({'; '.join(notes) or 'none at all'})")
    notes += check_comparable(runs, options.allow)
    groups, duplicates = group(runs)
    baseline = None if options.baseline is None else find_group(groups, options.baseline)
    table = report.rows(groups, baseline)
    page = report.markdown(table, baseline, notes + duplicates)
    output_dir = options.output_dir or Path("runs") / f"compare-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    contents = {
        "comparison.md": page.encode(),
        "comparison.csv": report.comma_separated(table).encode(),
        "comparison.png": report.figure(table, baseline),
    }
    print(page)
    try:
        for name, content in contents.items():
            write_atomically(output_dir / name, content)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: cannot be written: {error}") from error
    print(f"saved in {output_dir}: {', '.join(contents)}")
    if not options.no_mlflow:
        experiment = f"{options.experiment_name or 'lightning_moe'}: comparisons"  # the runs' own table has only runs
        files, tags = {output_dir / name: None for name in contents}, {"kind": "comparison", NOTE_TAG: page}
        if (address := log_files(output_dir, uri, experiment, files, tags)) is not None:
            print(f"in MLflow: {address}")


def _parser(command: str) -> argparse.ArgumentParser:
    parser = command_parser(command, DESCRIPTION)
    parser.add_argument(
        "runs", nargs="*", type=home_path, metavar="FOLDER", help="run folders, or folders that hold runs"
    )
    add_shared(parser, "--experiment_name", " to log to; without folders, the one whose runs are compared")
    parser.add_argument("--filter", default="", help="MLflow's search, such as \"tags.sweep = 'learning_rate'\"")
    add_shared(parser, "--tracking_uri", " (default: as for fit)")
    parser.add_argument("--baseline", metavar="GROUP", help="group, or the beginning of its name, to compare with")
    parser.add_argument(
        "--allow", action="append", default=[], choices=ALLOWABLE, help="a difference that does not matter here"
    )
    add_shared(parser, "--output_dir", " (default: runs/compare-<time>)")
    add_shared(parser, "--no_mlflow")
    return parser
