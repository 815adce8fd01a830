"""``audit``: whether a checkpoint's routing and output depend on anything but a token's own past."""

from __future__ import annotations

import argparse

from lightning_moe.cli.arguments import add_checkpoint_or_model, add_shared, at_least, command_parser, read_text
from lightning_moe.errors import UserError

DESCRIPTION = """\
Feed text to a checkpoint or a released model, change what a token must not depend on (passes before this one, future
tokens, other sequences of the batch, the batch size, padding; decoding with the key/value cache), and report what
changes in each layer's routing and in the output, and what a pass changes in the model. The routing rule is also asked
by itself, about more tokens and in other batches. The model runs in float64, so that rounding neither hides nor feigns
a leak. The verdict says what was not covered.

Text: the validation text of the checkpoint's run, by the config.yaml in the run's folder; or --text, encoded with the
run's tokenizer. For a checkpoint outside of a run's folder, give --text and --tokenizer. For a released model: --text
or, without it, the validation text of the default corpus."""

DEFAULT_SEQUENCE_LENGTH = 256  # of released models, whose context may be very long


def run(command: str, args: list[str]) -> None:
    """Print the report; the exit code is the verdict's.

    Raises:
        UserError: the checkpoint, the text or the tokenizer cannot be used.
        SystemExit: code 1 on a leak, 5 without a verdict, 2 on unknown options, 0 after ``--help``.
    """
    options = _parser(command).parse_args(args)
    import torch

    from lightning_moe.training.quiet import quiet

    quiet()
    from lightning_moe.audit import audit, format_report, verdict
    from lightning_moe.checkpoints.read import read_verified
    from lightning_moe.model import CausalLM
    from lightning_moe.module import LanguageModel
    from lightning_moe.routing import Phase
    from lightning_moe.runs.loading import check_tokenizer, rule_name, text_source, to_device
    from lightning_moe.runs.released import default_text, open_released

    decoder: CausalLM
    if options.model is not None:
        released = open_released(options.model, options, options.sequence_length or DEFAULT_SEQUENCE_LENGTH)
        decoder, tokenizer = released.lm, released.tokenizer
        length, rule = decoder.max_sequence_length, type(next(decoder.moe_layers()).rule).__name__
        data = None if options.text is not None else default_text(tokenizer, length)
    else:
        checkpoint = read_verified(options.ckpt_path)
        decoder = to_device(LanguageModel.from_checkpoint(checkpoint, str(options.ckpt_path)), options.device).decoder
        length, rule = options.sequence_length or decoder.max_sequence_length, rule_name(checkpoint)
        tokenizer, data = text_source(options.ckpt_path, checkpoint, options.tokenizer, options.text is not None)
        check_tokenizer(tokenizer, checkpoint, "--tokenizer, and --text")
    if options.text is not None:
        ids = tokenizer.encode(read_text("--text", options.text))
    else:
        assert data is not None
        ids = data.store.tokens("validation").tolist()
    wanted = options.batch_size * length
    if len(ids) < wanted:
        raise UserError(
            f"{options.text or 'the validation text'} has {len(ids)} tokens, but {options.batch_size} sequences of "
            f"{length} take {wanted}: give more text, or a smaller --batch_size or --sequence_length."
        )
    text = torch.tensor(ids[:wanted], dtype=torch.int64, device=options.device).view(-1, length)
    findings = audit(decoder.double(), text, Phase(options.phase), options.seed)
    shape = f"{options.batch_size} sequences of {length} tokens"
    print(f"{options.model or options.ckpt_path}: {rule}, phase {options.phase}, {shape}\n")
    print(format_report(findings))
    if code := verdict(findings).value:
        raise SystemExit(code)


def _parser(command: str) -> argparse.ArgumentParser:
    codes = "Exit code: 0 causal, 1 something leaks, 2 bad input, 5 not judged."
    parser = command_parser(command, DESCRIPTION, epilog=codes)
    add_checkpoint_or_model(parser)
    add_shared(parser, "--text", " (default: the run's validation text)")
    add_shared(parser, "--tokenizer")
    parser.add_argument(
        "--phase",
        choices=("causal", "train", "warmup"),
        default="causal",
        help="routing to audit: inference (default), training, or training before the switch to thresholds",
    )
    add_shared(parser, "--batch_size", type=at_least(2), default=8)
    add_shared(parser, "--sequence_length", " (default: the model's context; 256 with --model)", type=at_least(4))
    add_shared(parser, "--seed", " for the tokens that replace text")
    add_shared(parser, "--device")
    return parser
