"""``python -m benchmarks``: how long layers, steps and decoding take, as ratios measured side by side."""

from __future__ import annotations

import argparse
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.comparisons import COMPARISONS
from benchmarks.report import document, figure, machine, table
from benchmarks.setup import PRESETS, Row, rule_called
from lightning_moe.atomic import write_atomically
from lightning_moe.cli.arguments import at_least, refuse_unwritable
from lightning_moe.cli.main import report_errors
from lightning_moe.errors import UserError
from lightning_moe.training.memory import keep_freed_memory

DESCRIPTION = """\
Time the MoE layer, whole training steps, decoding, how they grow, what thresholds and metrics cost, and measure memory.
Every round runs each case once, in one process, so that other work on the machine meets all of them alike; what is
reported is the median over the rounds of each case's time over that of the comparison's first case, with the quartiles.
Cases that should compute the same are compared before they are timed. With `transformers` installed, its experts and
its decoding are cases too. --routing adds rules of one's own to the layer, its memory, the training step and decoding;
put the file that defines them on PYTHONPATH."""

SIZES = {
    "hidden_size": "of the layer and the decoder",
    "num_tokens": "of a forward pass: a multiple of the sequence length, or below it",
    "sequence_length": "of the decoder's windows",
    "num_experts": "routed experts",
    "num_layers": "of the decoder",
    "vocab_size": "of the decoder",
    "rounds": "of each comparison, at least 2",
}


def run(args: list[str]) -> None:
    """Print the table; with ``--output`` write it, the JSON and the figure there.

    Raises:
        UserError: the device is not there, or the folder exists.
        SystemExit: code 2 on unknown options, 0 after ``--help``.
    """
    options = _parser().parse_args(args)
    output = None if options.output is None else Path(options.output)
    if output is not None and output.exists():
        raise UserError(f"--output {output}: exists, and nothing is overwritten; give another folder.")
    if output is not None:
        refuse_unwritable(output, "--output")
    if options.device == "cpu":
        keep_freed_memory()  # as in training
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        device = torch.device(options.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {options.device}: {str(error).splitlines()[0]}") from None
    for name in options.routing:
        rule_called(name)  # refused before the first minute of measuring
    sizes = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
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
    if output is not None:
        image = io.BytesIO()
        figure(rows, title).savefig(image, dpi=150)
        write_atomically(output / "bench.json", json.dumps(document(rows, setups), indent=1).encode())
        write_atomically(output / "bench.txt", f"{text}\n".encode())
        write_atomically(output / "bench.png", image.getvalue())
        print(f"\nwritten to {output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--compare", nargs="+", choices=COMPARISONS, help="what to measure (default: everything)")
    parser.add_argument("--output", metavar="DIR", help="folder for bench.json, bench.txt and bench.png")
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
    parser.add_argument(
        "--precision", choices=("32-true", "bf16-mixed", "bf16-true"), default="32-true", help="(default: 32-true)"
    )
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="of torch (default: as torch finds)")
    return parser


if __name__ == "__main__":
    sys.exit(report_errors(lambda: run(sys.argv[1:])))
