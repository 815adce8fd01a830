"""``audit``: whether a checkpoint's routing and output depend on anything but a token's own past."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_moe.cli.arguments import at_least, command_parser
from lightning_moe.errors import UserError

if TYPE_CHECKING:
    from lightning_moe.data import Tokenizer

DESCRIPTION = """\
Feed text to a checkpoint, change what a token must not depend on (future tokens, other sequences of the batch, the
batch size, padding; decoding with the key/value cache), and report what changes in each layer's routing and in the
output. Runs on the CPU in float64, so that rounding does not hide or feign a leak.

Text: the validation text of the checkpoint's run, from the config.yaml of the run's folder; or --text, encoded with the
run's tokenizer. For a checkpoint outside of a run's folder give --text and --tokenizer."""


def run(command: str, args: list[str]) -> None:
    """Print the report; leave with exit code 1 if something leaks.

    Raises:
        UserError: the checkpoint, the text or the tokenizer cannot be used.
        SystemExit: code 1 on a leak, 2 on unknown options, 0 after ``--help``.
    """
    options = _parser(command).parse_args(args)
    import torch

    from lightning_moe.training.quiet import quiet

    quiet()
    from lightning_moe.audit import audit, format_report
    from lightning_moe.checkpoints.read import read_verified
    from lightning_moe.module import LanguageModel
    from lightning_moe.routing import Phase
    from lightning_moe.runs.loading import check_tokenizer, rule_name

    ckpt_path = Path(options.ckpt_path)
    checkpoint = read_verified(ckpt_path)
    decoder = LanguageModel.from_checkpoint(checkpoint).decoder
    length = options.sequence_length or decoder.config.max_sequence_length
    tokenizer, ids = _tokens(ckpt_path, options.text, options.tokenizer)
    check_tokenizer(tokenizer, checkpoint, "--tokenizer, and --text")
    wanted = options.num_sequences * length
    if len(ids) < wanted:
        raise UserError(
            f"{options.text or 'the validation text'} has {len(ids)} tokens, but {options.num_sequences} sequences of "
            f"{length} take {wanted}: give more text, or a smaller --num_sequences or --sequence_length."
        )
    text = torch.tensor(ids[:wanted], dtype=torch.int64).view(-1, length)
    findings = audit(decoder.double(), text, Phase(options.phase), options.seed)
    rule = rule_name(checkpoint)
    print(f"{ckpt_path}: {rule}, phase {options.phase}, {options.num_sequences} sequences of {length} tokens\n")
    print(format_report(findings))
    if any(finding.leaks for finding in findings):
        raise SystemExit(1)


def _parser(command: str) -> argparse.ArgumentParser:
    parser = command_parser(command, DESCRIPTION, epilog="Exit code: 0 causal, 1 something leaks, 2 bad input.")
    parser.add_argument("--ckpt_path", required=True, metavar="PATH", help="the checkpoint, or the folder of an export")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text (default: the run's validation text)")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json (default: the run's)")
    parser.add_argument(
        "--phase",
        choices=("causal", "train", "warmup"),
        default="causal",
        help="whose routing is audited: inference (default), training, or training before the switch to thresholds",
    )
    parser.add_argument("--num_sequences", type=at_least(2), default=8, metavar="B", help="batch size (default: 8)")
    parser.add_argument(
        "--sequence_length", type=at_least(4), metavar="S", help="tokens per sequence (default: the model's context)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the tokens that replace text (default: 1)")
    return parser


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path}: {error}") from None


def _tokens(ckpt_path: Path, text: str | None, tokenizer_file: str | None) -> tuple[Tokenizer, list[int]]:
    """All the text as token ids, and the tokenizer that they are of."""
    from lightning_moe.checkpoints.exported import bundled_tokenizer
    from lightning_moe.data import Tokenizer
    from lightning_moe.runs.loading import run_data

    tokenizer_file = tokenizer_file or bundled_tokenizer(ckpt_path)
    if tokenizer_file is not None:
        if text is None:
            raise UserError(f"tokenizer {tokenizer_file}: it encodes --text; give that too.")
        tokenizer = Tokenizer.load(tokenizer_file)
        return tokenizer, tokenizer.encode(_read(text))
    data = run_data(ckpt_path, "--text and --tokenizer")
    ids = data.store.tokens("validation").tolist() if text is None else data.tokenizer.encode(_read(text))
    return data.tokenizer, ids
