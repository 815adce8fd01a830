"""``python -m benchmarks``: how long layers, steps and decoding take, as ratios measured side by side."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import suite
from benchmarks.comparisons import COMPARISONS
from benchmarks.gpu_cases import Sizes, cases
from benchmarks.report import document, figure, machine, table
from benchmarks.setup import PRESETS, Row, rule_called
from benchmarks.suite import Result, line, run_cases
from lightning_moe.atomic import write_atomically
from lightning_moe.cli.arguments import add_shared, at_least, real_number, refuse_existing
from lightning_moe.cli.main import report_errors
from lightning_moe.errors import UserError
from lightning_moe.report.figures import png
from lightning_moe.training.memory import keep_freed_memory

DESCRIPTION = """\
Time the MoE layer, whole training steps, decoding, how they grow, what thresholds and metrics cost, and measure memory.
Every round runs each case once, in one process, so that other work on the machine meets all of them alike. The result
is each case's time over that of the comparison's first case: the median over the rounds, and the quartiles. Cases that
should compute the same are compared before they are timed. If `transformers` is installed, its experts and its decoding
are cases too. --routing adds your own rules to the layer, its memory, the training step and decoding; put the file that
defines them on PYTHONPATH.

--suite gpu measures what matters on one GPU instead, in a few minutes: layers, training steps, the quickstart and their
parts, eager and compiled. A case that fails is a row with its error. Rows are printed and written as they come."""

SIZES = {
    "hidden_size": "width of the layer and the decoder",
    "num_tokens": "tokens of a forward pass: a multiple of the sequence length, or fewer",
    "num_experts": "routed experts",
    "num_layers": "layers of the decoder",
    "vocab_size": "tokens that the decoder knows",
    "rounds": "times that each case is measured, at least 2",
}


def run(args: list[str]) -> None:
    """Print the table; with ``--output_dir`` write it, the JSON and the figure there.

    Raises:
        UserError: the machine has no such device, or the folder exists.
        SystemExit: code 2 on unknown options, 0 after ``--help``.
    """
    options = _parser().parse_args(args)
    options.device = options.device or ("cpu" if options.suite is None else "cuda")
    options.precision = options.precision or (
        "32-true" if options.suite is None or options.device == "cpu" else "bf16-mixed"
    )
    output_dir: Path | None = options.output_dir
    if output_dir is not None:
        refuse_existing(output_dir)
    if options.device == "cpu":
        keep_freed_memory()  # as in training
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        device = torch.device(options.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {options.device}: {str(error).splitlines()[0]}") from None
    sizes = {name: size for name in (*SIZES, "sequence_length") if (size := getattr(options, name)) is not None}
    if options.suite is not None:
        _run_suite(options, device, sizes)
        return
    for name in options.routing:
        rule_called(name)  # refused before the first minute of measuring
    setups = {
        name: replace(
            PRESETS[name], device=device, precision=options.precision, routing=tuple(options.routing), **sizes
        )
        for name in options.preset
    }
    rows: list[Row] = []
    with tqdm(unit="case", leave=False) as progress:
        for name in options.compare or COMPARISONS:
            progress.set_description(name)
            for setup in setups.values():
                for row in COMPARISONS[name](setup):
                    rows.append(row)
                    progress.update()
    text = table(rows)
    facts = machine()
    title = (
        f"{facts['device']}, {facts['threads']} threads, torch {torch.__version__}, {options.precision}, "
        f"transformers {facts['transformers']}"
    )
    print(f"{title}\n\n{text}")
    if output_dir is not None:
        write_atomically(output_dir / "bench.json", json.dumps(document(rows, setups), indent=1).encode())
        write_atomically(output_dir / "bench.txt", f"{text}\n".encode())
        write_atomically(output_dir / "bench.png", png(figure(rows, title)))
        print(f"\nwritten to {output_dir}")


def _run_suite(options: argparse.Namespace, device: torch.device, sizes: dict[str, int]) -> None:
    """Print the rows of ``--suite gpu`` as they come; write them after each one, so that nothing measured is lost."""
    setups = {
        name: replace(PRESETS[name], **{"device": device, "precision": options.precision, "rounds": 10, **sizes})
        for name in ("d12", "small")
    }
    facts = {"machine": machine(), "setups": {name: asdict(setup) for name, setup in setups.items()}}
    print(f"{facts['machine']['device']}, torch {torch.__version__}, {options.precision}\n", flush=True)
    results: list[Result] = []
    for result in run_cases(cases(Sizes(setups["d12"], setups["small"])), options.max_seconds, device):
        results.append(result)
        print(line(result), flush=True)
        if options.output_dir is not None:
            write_atomically(options.output_dir / "bench.json", suite.document(results, facts).encode())
            write_atomically(options.output_dir / "bench.txt", f"{suite.table(results)}\n".encode())
    print(f"\n{suite.table(results)}")
    if options.output_dir is not None:
        print(f"\nwritten to {options.output_dir}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--compare", nargs="+", choices=COMPARISONS, help="what to measure (default: everything)")
    parser.add_argument("--suite", choices=("gpu",), help="measure this suite instead of comparisons")
    parser.add_argument(
        "--max_seconds",
        type=real_number(0, open_low=True),
        default=200.0,
        metavar="S",
        help="time after which no further case of a suite begins (default: 200)",
    )
    add_shared(parser, "--output_dir", ", with bench.json, bench.txt and bench.png (default: none)")
    parser.add_argument(
        "--preset",
        nargs="+",
        choices=PRESETS,
        default=["cpu"],
        help="sizes: for two CPU cores, or the layers of the paper's models for a GPU (default: cpu)",
    )
    parser.add_argument(
        "--routing",
        nargs="+",
        default=[],
        metavar="RULE",
        help="more routing rules: a name under conf/routing, a YAML file, or a class such as my_rules.TopP",
    )
    for name, text in SIZES.items():
        low = 2 if name == "rounds" else 1
        parser.add_argument(f"--{name}", type=at_least(low), metavar="N", help=f"{text} (default: the preset's)")
    add_shared(parser, "--sequence_length", " (default: the preset's)", type=at_least(1))
    add_shared(parser, "--precision", " (default: 32-true; of a suite on a GPU bf16-mixed)")
    add_shared(parser, "--device", " (default: cpu; of a suite cuda)", default=None)
    parser.add_argument(
        "--threads", type=at_least(1), metavar="N", help="CPU threads of torch (default: torch's own choice)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(report_errors(lambda: run(sys.argv[1:])))
