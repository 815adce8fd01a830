"""``validate --model``: the loss of a released model on text, with its own routing, another number of experts, or
thresholds."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from lightning_moe.cli.arguments import add_shared, command_parser, real_number
from lightning_moe.errors import UserError
from lightning_moe.report.tables import text_table

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_moe.analysis.collect import Losses
    from lightning_moe.analysis.text import Domain

DESCRIPTION = """\
Score a released model of the transformers library on text, and print its loss per domain and the use of its experts.
Nothing is recorded. `validate --ckpt_path` scores checkpoints of this package.

Text: --text or, without it, the validation text of the default corpus."""

DEFAULT_SEQUENCE_LENGTH, DEFAULT_MAX_TOKENS = 512, 65536


def run(command: str, args: list[str]) -> None:
    """Print the scores.

    Raises:
        UserError: the model, the tokenizer or the text cannot be used.
        SystemExit: code 2 on unknown options, 0 after ``--help``.
    """
    parser = _parser(command)
    if any(arg.partition("=")[0] == "--ckpt_path" for arg in args):
        parser.error("give one of --model and --ckpt_path")
    options = parser.parse_args(args)
    import torch
    from tqdm import tqdm

    from lightning_moe.analysis.collect import Losses
    from lightning_moe.analysis.observe import observe
    from lightning_moe.analysis.text import batches
    from lightning_moe.cli.text_of_released import domains_for
    from lightning_moe.model import inference_num_experts_per_token, named_moe_layers
    from lightning_moe.runs.released import open_released
    from lightning_moe.training.quiet import quiet

    quiet()
    released = open_released(options.model, options, options.sequence_length or DEFAULT_SEQUENCE_LENGTH)
    lm, tokenizer = released.lm, released.tokenizer
    length, context = options.sequence_length or 0, lm.max_sequence_length
    if length > context:
        raise UserError(f"--sequence_length {length}: the model's context is {context}.")
    domains = domains_for(options.text, tokenizer, lm.max_sequence_length)
    losses = Losses(tokenizer.token_bytes, len(domains))
    layers = list(named_moe_layers(lm))
    usage = torch.zeros(len(layers), lm.num_experts, dtype=torch.float64)
    stream = batches(domains, lm.max_sequence_length, options.batch_size, options.max_tokens or None)
    with (
        inference_num_experts_per_token(lm, options.inference_num_experts_per_token),
        tqdm(desc="Scoring", unit=" tokens", unit_scale=True, disable=None, leave=False) as bar,
    ):
        for batch in stream:
            seen = observe(lm, batch)
            losses.update(batch, seen.loss)
            usage += seen.experts[seen.valid].double().sum(0)
            bar.update(int(seen.valid.sum()))
    print(_scores(losses, domains))
    print(_experts(layers, usage / losses.tokens.sum()))


def _parser(command: str) -> argparse.ArgumentParser:
    parser = command_parser(f"{command} --model", DESCRIPTION)
    add_shared(parser, "--model", required=True)
    add_shared(parser, "--dtype")
    add_shared(parser, "--trust_remote_code")
    add_shared(
        parser,
        "--text",
        ", or .jsonl, .parquet, a folder or a glob; may be given several times",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
    )
    add_shared(parser, "--tokenizer")
    add_shared(parser, "--max_tokens", ", of each domain", default=DEFAULT_MAX_TOKENS)
    add_shared(parser, "--sequence_length", f" (default: {DEFAULT_SEQUENCE_LENGTH}, or the context if that is shorter)")
    add_shared(parser, "--batch_size", default=8)
    parser.add_argument(
        "--inference_num_experts_per_token",
        type=real_number(0, open_low=True),
        nargs="+",
        metavar="K",
        help="route to this many experts per token (a mean, for thresholds), or one value per MoE layer "
        "(default: as released or calibrated)",
    )
    add_shared(parser, "--device")
    return parser


def _scores(losses: Losses, domains: list[Domain]) -> str:
    rows: list[tuple[str, ...]] = [("text", "tokens", "loss / nats", "perplexity", "bits per byte")]
    parts: list[tuple[str, float, int, int | None]] = [
        (domain.name, float(losses.nll[index]), int(losses.tokens[index]), index)
        for index, domain in enumerate(domains)
    ]
    if len(parts) > 1:
        parts.append(("all", float(losses.nll.sum()), int(losses.tokens.sum()), None))
    for name, nll, tokens, index in parts:
        mean = nll / max(1, tokens)
        perplexity = f"{math.exp(mean):.3f}" if mean < 700 else "inf"
        rows.append((name, f"{tokens:,}", f"{mean:.4f}", perplexity, f"{losses.bits_per_byte(index):.4f}"))
    return text_table(rows, right=range(1, 5))


def _experts(layers: list[str], usage: Tensor) -> str:
    rows: list[tuple[str, ...]] = [("experts per token", "mean", "largest share of a layer's load", "smallest")]
    for name, each in zip(layers, usage, strict=True):
        total = each.sum().clamp_min(1e-12)
        rows.append(
            (name, f"{float(each.sum()):.3f}", f"{float(each.max() / total):.2%}", f"{float(each.min() / total):.2%}")
        )
    return "\n" + text_table(rows, right=range(1, 4))
