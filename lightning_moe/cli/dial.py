"""``dial``: loss of a released model against its mean number of experts per token."""

from __future__ import annotations

import argparse

from lightning_moe.cli.arguments import add_shared, command_parser, read_text, real_number, refuse_existing
from lightning_moe.cli.calibrate_model import experts_per_layer
from lightning_moe.cli.calibration_text import refuse_inside, text_for, window_length
from lightning_moe.errors import UserError
from lightning_moe.report.tables import text_table

DESCRIPTION = """\
Measure the loss of a released model at other mean numbers of experts per token, without training: its own top-k with
another k, top-p, min-p and per-expert thresholds, each at the same mean in every MoE layer. The command writes dial.md,
dial.png and dial.csv.

Text: the validation text of the default corpus, or --text, cut into windows. Every second window sets the parameters of
the methods; the losses are those of the others."""


def run(command: str, args: list[str]) -> None:
    """Write the page and print its table.

    Raises:
        UserError: the model, the text, the tokenizer or the output cannot be used.
        SystemExit: code 2 on unknown options, 0 after ``--help``.
    """
    options = _parser(command).parse_args(args)
    from tqdm import tqdm

    from lightning_moe.atomic import atomic_folder
    from lightning_moe.calibrate import Windows
    from lightning_moe.dial import METHODS, default_targets, dial, refusal
    from lightning_moe.dial.page import HEAD, PAGE_FILE, cells, write_page
    from lightning_moe.runs.released import open_released
    from lightning_moe.training.quiet import quiet

    quiet()
    output_dir = options.output_dir
    refuse_existing(output_dir)
    refuse_inside(output_dir, options.model)
    if options.text is not None:
        read_text("--text", options.text)  # before the model, which takes longer
    released = open_released(options.model, options)
    lm = released.lm
    refuse_inside(output_dir, released.name)
    targets = options.num_experts_per_token or default_targets(lm)
    for target in targets:
        experts_per_layer(lm, [target])
    length = window_length(options, released)
    text = text_for(options, released, length)
    tokens = text.tokens if text.validation is None else text.validation
    source = text.source if text.validation is None else "the validation split of the default corpus"
    calibration, unused = Windows.spread(tokens, length, 2 * (options.max_tokens or len(tokens))).split()
    every = sorted({*targets, float(lm.layers[0].top_k)})
    count = sum(refusal(lm, method, target) is None for target in every for method in METHODS)
    with tqdm(total=count, desc="measuring", leave=False) as progress:
        points = dial(lm, targets, calibration, unused, progress.update)
    facts = [
        f"* model: {released.name}",
        f"* text: {source}: {len(calibration.starts) * length:,} tokens set the parameters, the losses are those of "
        f"{points[0].measured.num_tokens:,} others, in windows of {length}",
        f"* MoE layers: {len(lm.layers)} with {lm.num_experts} experts each, of which {lm.layers[0].top_k} see a token "
        "as released",
    ]
    try:
        with atomic_folder(output_dir) as new:
            write_page(new, "Loss against mean experts per token", facts, points)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: cannot be written: {error}") from error
    print(text_table([HEAD, *map(cells, points)], right=(0, 2, 3, 4, 5, 6)))
    print(f"\npage   {output_dir / PAGE_FILE}")


def _parser(command: str) -> argparse.ArgumentParser:
    parser = command_parser(command, DESCRIPTION)
    add_shared(parser, "--model", required=True)
    for flag in ("--dtype", "--trust_remote_code"):
        add_shared(parser, flag)
    add_shared(parser, "--output_dir", required=True)
    parser.add_argument(
        "--num_experts_per_token",
        type=real_number(0, open_low=True),
        nargs="+",
        metavar="K",
        help="mean numbers of experts per token to measure (default: from a quarter to twice what the model was "
        "released with)",
    )
    add_shared(parser, "--text", " (default: the validation text of the default corpus)")
    add_shared(parser, "--tokenizer")
    add_shared(parser, "--max_tokens", "; as many more measure", default=65_536)
    add_shared(parser, "--sequence_length", " (default: the model's context, at most 1024)")
    add_shared(parser, "--device")
    return parser
