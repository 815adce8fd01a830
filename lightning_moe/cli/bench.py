"""``bench``: how long layers, steps and decoding take, as ratios measured side by side."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

from lightning_moe.cli.arguments import at_least, command_parser
from lightning_moe.errors import UserError

DESCRIPTION = """\
Time the MoE layer, whole training steps, decoding, their scaling, and what thresholds and metrics cost. Every round
runs each case once, in one process, so that other work on the machine meets all of them alike; what is reported is the
median over the rounds of each case's time over that of the comparison's first case, with the quartiles. Cases that
should compute the same are compared before they are timed."""

COMPARISONS = ("layer", "step", "decoding", "scaling", "overhead")


def run(command: str, args: list[str]) -> None:
    """Print the table; with ``--output`` write it, the JSON and the figure there.

    Raises:
        UserError: the device is not there, or the folder exists.
        SystemExit: code 2 on unknown options, 0 after ``--help``.
    """
    options = _parser(command).parse_args(args)
    output = None if options.output is None else Path(options.output)
    if output is not None and output.exists():
        raise UserError(f"--output {output}: exists, and nothing is overwritten; give another folder.")
    import torch
    from tqdm import tqdm

    from lightning_moe.atomic import write_atomically
    from lightning_moe.bench import cases
    from lightning_moe.bench.report import document, figure, machine, table

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        device = torch.device(options.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {options.device}: {str(error).splitlines()[0]}") from None
    setup = cases.Setup(
        options.hidden_size,
        options.num_tokens,
        options.num_experts,
        options.num_layers,
        getattr(torch, options.dtype),
        device,
        options.rounds,
    )
    rows: list[cases.Row] = []
    with tqdm(unit="case", leave=False) as progress:
        for name in options.compare or COMPARISONS:
            progress.set_description(name)
            for row in cases.COMPARISONS[name](setup):
                rows.append(row)
                progress.update()
    text = table(rows)
    facts = machine()
    print(f"{facts['device']}, {facts['threads']} threads, torch {torch.__version__}, {options.dtype}\n\n{text}")
    if output is not None:
        image = io.BytesIO()
        figure(rows).savefig(image, dpi=150)
        write_atomically(output / "bench.json", json.dumps(document(rows, setup), indent=1).encode())
        write_atomically(output / "bench.txt", f"{text}\n".encode())
        write_atomically(output / "bench.png", image.getvalue())
        print(f"\nwritten to {output}")


def _parser(command: str) -> argparse.ArgumentParser:
    parser = command_parser(command, DESCRIPTION)
    parser.add_argument("--compare", nargs="+", choices=COMPARISONS, help="what to time (default: everything)")
    parser.add_argument("--output", metavar="DIR", help="folder for bench.json, bench.txt and bench.png")
    for name, default, text in (
        ("hidden_size", 512, "of the layer and the decoder"),
        ("num_tokens", 4096, "of a forward pass: a multiple of 256, or below it"),
        ("num_experts", 16, "routed experts"),
        ("num_layers", 4, "of the decoder"),
        ("rounds", 15, "of each comparison"),
    ):
        parser.add_argument(
            f"--{name}", type=at_least(1), default=default, metavar="N", help=f"{text} (default: {default})"
        )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="of torch (default: as torch finds)")
    return parser
