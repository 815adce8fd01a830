"""``replay``: a recorded generation in a full pass, routed freely and as recorded."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_moe.cli.arguments import add_checkpoint_or_model, add_shared, command_parser, home_path
from lightning_moe.errors import UserError

DESCRIPTION = """\
Score the tokens of a generation in full passes, as a training step sees them, and report how far this differs from the
generation: how many tokens take other experts in each layer, and the KL divergence. Once the routing rule chooses the
experts, and once every token takes those on record, so that none differ.

`generate --save_routes FILE` records a generation. Its precision may be another one: --precision bf16-mixed there and
32-true here shows what a policy that is trained in another precision than it generates in has to expect."""


def run(command: str, args: list[str]) -> None:
    """Print the report.

    Raises:
        UserError: the checkpoint or the routes cannot be used, or do not belong together.
        SystemExit: code 2 on unknown options, 0 after ``--help``.
    """
    options = _parser(command).parse_args(args)

    import torch

    from lightning_moe.checkpoints.read import read_verified
    from lightning_moe.hf import open_model
    from lightning_moe.model import CausalLM, inference_num_experts_per_token
    from lightning_moe.model.precision import computing_in, precision_of
    from lightning_moe.module import LanguageModel
    from lightning_moe.replay import read_routes, score, weights_fingerprint
    from lightning_moe.replay.report import format_score
    from lightning_moe.runs.loading import to_device

    routes = read_routes(options.routes)
    decoder: CausalLM
    if options.model is not None:
        dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
        decoder, _ = open_model(options.model, dtype, options.device, None, options.trust_remote_code)
    else:
        checkpoint = read_verified(options.ckpt_path)
        decoder = to_device(LanguageModel.from_checkpoint(checkpoint, str(options.ckpt_path)), options.device).decoder
    try:
        routes.check_fits(decoder)
    except UserError as error:
        raise UserError(f"--routes {options.routes}: {error}") from None
    _check_weights(
        options.routes, routes.made.weights, options.model or options.ckpt_path, weights_fingerprint(decoder)
    )
    if not routes.new.any():
        raise UserError(
            f"--routes {options.routes}: has no new token to score: generate with --max_new_tokens above 0."
        )
    with (
        computing_in(decoder, options.precision),
        inference_num_experts_per_token(decoder, routes.made.inference_num_experts_per_token),
    ):
        found, precision = score(decoder, routes, options.batch_size), precision_of(decoder)
    print(format_score(found, routes.made, precision))


def _check_weights(file: Path, recorded: str, name: Path | str, own: str) -> None:
    if recorded != own:
        raise UserError(
            f"--routes {file}: was generated with other weights ({recorded or 'not recorded which'}) than those of "
            f"{name} ({own}): give the model that generated it. (In Python, `replay.score` takes all weights "
            "of this shape.)"
        )


def _parser(command: str) -> argparse.ArgumentParser:
    parser = command_parser(command, DESCRIPTION)
    add_checkpoint_or_model(parser)
    parser.add_argument(
        "--routes", type=home_path, required=True, metavar="FILE", help="file that `generate --save_routes` wrote"
    )
    add_shared(parser, "--precision", " (default: that of the weights)")
    add_shared(parser, "--batch_size", ", two times whose logits are held", default=8)
    add_shared(parser, "--device")
    return parser
