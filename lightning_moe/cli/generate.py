"""``generate``: continue texts with a checkpoint."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_moe.cli.arguments import (
    add_checkpoint_or_model,
    add_shared,
    at_least,
    command_parser,
    home_path,
    read_text,
    real_number,
    refuse_unwritable,
)
from lightning_moe.errors import UserError

if TYPE_CHECKING:
    from lightning_moe.cli.routing_colors import Palette
    from lightning_moe.model import CausalLM, Piece

DESCRIPTION = """\
Continue one or several texts with a checkpoint, or with a released model. Routing is causal, as in validation: each
token takes the experts that it takes in the full forward pass over the same text. A prompt is the beginning of a
document; without one the model begins the document."""

DEFAULT_NEW_TOKENS = 128
DEFAULT_BATCH_SIZE = 32


def run(command: str, args: list[str]) -> None:
    """Print prompts and continuations to stdout, of a single prompt as they come, and statistics to stderr.

    Raises:
        UserError: the checkpoint, the tokenizer, a prompt or an option cannot be used.
        SystemExit: code 2 on unknown options, 0 after ``--help``.
    """
    options = _parser(command).parse_args(args)
    prompts = _prompts(options.prompt, options.prompt_file)

    from lightning_moe.checkpoints.read import read_verified
    from lightning_moe.cli.routing_colors import Palette
    from lightning_moe.model import inference_num_experts_per_token, stream_text
    from lightning_moe.model.precision import computing_in
    from lightning_moe.module import LanguageModel
    from lightning_moe.runs.loading import check_tokenizer, to_device, tokenizer_of
    from lightning_moe.runs.released import open_released

    decoder: CausalLM
    if options.model is not None:
        released = open_released(options.model, options)
        decoder, tokenizer = released.lm, released.tokenizer
    else:
        checkpoint = read_verified(options.ckpt_path)
        decoder = to_device(LanguageModel.from_checkpoint(checkpoint, str(options.ckpt_path)), options.device).decoder
        tokenizer = tokenizer_of(options.ckpt_path, checkpoint, options.tokenizer, "--tokenizer")
        check_tokenizer(tokenizer, checkpoint, "--tokenizer")
    max_new_tokens = _max_new_tokens(options, decoder, [1 + len(tokenizer.encode(prompt)) for prompt in prompts])
    record = _Record(options, decoder, len(prompts)) if options.save_routes is not None else None
    asked = options.inference_num_experts_per_token
    palette = Palette.of(decoder, sys.stdout.isatty() and not os.environ.get("NO_COLOR"), asked)
    if options.show_routing:
        print(palette.legend() + "\n")
    started = time.perf_counter()
    printed = _Printer(len(prompts), palette if options.show_routing and palette.layers else None)
    with computing_in(decoder, options.precision), inference_num_experts_per_token(decoder, asked):
        for piece in stream_text(
            decoder,
            tokenizer,
            prompts,
            max_new_tokens,
            stop=options.stop,
            with_experts=options.show_routing or record is not None,
            batch_size=options.batch_size,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
        ):
            printed.add(piece)
            if record is not None:
                record.add(piece)
        if record is not None:
            record.write()
    print(printed.statistics(time.perf_counter() - started), file=sys.stderr)


def _parser(command: str) -> argparse.ArgumentParser:
    parser = command_parser(command, DESCRIPTION)
    add_checkpoint_or_model(parser)
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be given several times"
    )
    parser.add_argument("--prompt_file", metavar="FILE", help="UTF-8 text, one prompt a line; empty lines are left out")
    parser.add_argument(
        "--max_new_tokens",
        type=at_least(0),
        metavar="N",
        help=f"tokens to add to each prompt (default: {DEFAULT_NEW_TOKENS}, or what fits into the model's context)",
    )
    parser.add_argument(
        "--temperature",
        type=real_number(0),
        default=1.0,
        metavar="T",
        help="0: always the most likely token (default: 1)",
    )
    parser.add_argument("--top_k", type=at_least(1), metavar="K", help="sample among the K most likely tokens")
    parser.add_argument(
        "--top_p",
        type=real_number(0, 1, open_low=True),
        metavar="P",
        help="sample among the likeliest that make up P together",
    )
    add_shared(parser, "--batch_size", ": prompts that are continued at a time", default=DEFAULT_BATCH_SIZE)
    add_shared(parser, "--seed", " for sampling")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    parser.add_argument(
        "--show_routing",
        action="store_true",
        help="colour every token by its number of routed experts; without a terminal or with NO_COLOR write the number",
    )
    parser.add_argument(
        "--save_routes",
        type=home_path,
        metavar="FILE",
        help="also write the tokens with the experts that each took, as safetensors; `replay` reads the file",
    )
    add_shared(parser, "--precision", " (default: that of the weights)")
    add_shared(parser, "--tokenizer")
    parser.add_argument(
        "--inference_num_experts_per_token",
        type=real_number(0, open_low=True),
        nargs="+",
        metavar="K",
        help="route to this many experts per token (a mean, for threshold rules), or one value per MoE layer "
        "(default: as trained)",
    )
    add_shared(parser, "--device")
    return parser


def _prompts(prompts: Sequence[str], file: str | None) -> list[str]:
    found = list(prompts)
    if file is not None:
        found += [line for line in read_text("--prompt_file", file).splitlines() if line.strip()]
        if not found:
            raise UserError(f"--prompt_file {file}: has no prompt; write one a line")
    return found or [""]


def _max_new_tokens(options: argparse.Namespace, decoder: CausalLM, lengths: list[int]) -> int:
    """Return the number asked for, or what fits after the longest prompt; ``lengths`` count ``<|endoftext|>``."""
    context, longest = decoder.max_sequence_length, max(lengths)
    room = context - longest + (not options.show_routing and options.save_routes is None)
    if room < 1 or (options.max_new_tokens or 0) > room:
        number = f"prompt {lengths.index(longest) + 1}" if len(lengths) > 1 else "the prompt"
        if options.prompt_file is not None:
            number += f" (of --prompt, then --prompt_file {options.prompt_file})"
        asked = "" if options.max_new_tokens is None else f" and --max_new_tokens {options.max_new_tokens}"
        raise UserError(
            f"{number} has {longest} tokens (with <|endoftext|> before it), which{asked} do not fit into the model's "
            f"context of {context}: "
            + ("shorten the prompt." if room < 1 else f"there is room for {room} new tokens after it.")
        )
    return int(min(DEFAULT_NEW_TOKENS, room) if options.max_new_tokens is None else options.max_new_tokens)


class _Record:
    """Recorder of the tokens and their routes, for ``--save_routes``.

    Raises:
        UserError: the model is dense, or the file cannot be written or exists.
    """

    def __init__(self, options: argparse.Namespace, decoder: CausalLM, num_rows: int) -> None:
        from lightning_moe.replay.record import Recorder, how_made, weights_fingerprint

        self.path, self.options, self.decoder = options.save_routes, options, decoder
        if self.path.exists():
            raise UserError(f"--save_routes {self.path}: exists, and nothing is overwritten; give another name.")
        refuse_unwritable(self.path.parent, "--save_routes")
        how_made(decoder)  # refuses a dense model before it generates
        self._weights = weights_fingerprint(decoder)  # before another precision rounds them
        self._recorder = Recorder(num_rows)

    def add(self, piece: Piece) -> None:
        assert piece.experts is not None
        self._recorder.add(piece.row, piece.token, piece.experts, piece.log_prob)

    def write(self) -> None:
        """Write the file, while the model is in the precision that it generated in."""
        from lightning_moe.replay.file import write_routes
        from lightning_moe.replay.record import how_made

        names = ("temperature", "top_k", "top_p", "inference_num_experts_per_token")
        made = how_made(self.decoder, self._weights, **{name: getattr(self.options, name) for name in names})
        try:
            write_routes(self.path, self._recorder.routes(made))
        except OSError as error:
            raise UserError(f"--save_routes {self.path}: cannot be written: {error}") from error


class _Printer:
    """Printer of one row as it comes, or of several rows in their order, each when it is complete."""

    def __init__(self, num_rows: int, palette: Palette | None) -> None:
        self.palette = palette
        self.rows: list[list[Piece]] = [[] for _ in range(num_rows)]
        self._next = 0  # the first row that is not printed yet
        self._safe = palette is not None or sys.stdout.isatty()  # else the text as it is, for another program

    def add(self, piece: Piece) -> None:
        self.rows[piece.row].append(piece)
        if len(self.rows) == 1:
            self._write([piece])
            return
        while self._next < len(self.rows) and self.rows[self._next] and self.rows[self._next][-1].finish:
            print(f"--- prompt {self._next + 1} of {len(self.rows)}")
            self._write(self.rows[self._next])
            self._next += 1

    def _write(self, pieces: Sequence[Piece]) -> None:
        from lightning_moe.training.summary import printable

        for piece in pieces:
            text = printable(piece.text) if self._safe else piece.text
            if self.palette is not None and piece.fanout is not None:
                text = self.palette.paint(text, piece.fanout)
            print(text, end="\n" if piece.finish else "", flush=True)

    def statistics(self, seconds: float) -> str:
        """Return one line: how much, how fast, and why it ended."""
        new = [piece for row in self.rows for piece in row if piece.sampled]
        ends = ", ".join(row[-1].finish or "" for row in self.rows)
        parts = [f"{len(new)} new tokens in {seconds:.1f} s ({len(new) / seconds:.0f}/s); ended by: {ends}"]
        fanout = [piece.fanout for piece in new if piece.fanout is not None]
        if fanout:
            parts.append(f"routed experts per new token, all layers: {sum(fanout) / len(fanout):.2f}")
        return "; ".join(parts)
