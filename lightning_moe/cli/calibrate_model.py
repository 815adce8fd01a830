"""``calibrate --model``: thresholds for a released model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_moe.cli.arguments import read_text
from lightning_moe.cli.calibration_text import refuse_inside, text_for, window_length
from lightning_moe.errors import UserError

if TYPE_CHECKING:
    from lightning_moe.hf import TransformersLM


def calibrate_model(options: argparse.Namespace) -> None:
    """Write the thresholds of a released model, and with ``--with_model`` the model too; print what came of them.

    Args:
        options: options of the command.

    Raises:
        UserError: the model, the text, the tokenizer or the output cannot be used.
    """
    from lightning_moe.atomic import atomic_folder
    from lightning_moe.calibrate import REPORT_FILE, calibrate_and_measure
    from lightning_moe.hf import write_sidecar
    from lightning_moe.hf.copy import check_copy, copy_model
    from lightning_moe.routing import ExpertThreshold
    from lightning_moe.runs.released import open_released

    output_dir = options.output_dir
    refuse_inside(output_dir, options.model)
    if options.with_model and options.dtype != "auto":
        raise UserError(
            f"--dtype {options.dtype}: --with_model copies the weights as they are; leave one of the two out."
        )
    if options.text is not None:
        read_text("--text", options.text)  # before the model, which takes longer
    released = open_released(options.model, options)
    lm, name = released.lm, released.name
    refuse_inside(output_dir, name)
    if options.with_model:
        check_copy(name, output_dir)
    rates = experts_per_layer(lm, options.num_experts_per_token)
    length = window_length(options, released)
    text = text_for(options, released, length)
    was = next(lm.moe_layers())
    before = f"{type(was.rule).__name__} with {was.state.num_experts_per_token:g} experts per token"

    def target() -> TransformersLM:
        for layer, rate in zip(lm.layers, rates, strict=True):
            layer.route_by(ExpertThreshold(), rate)
        return lm

    outcome = calibrate_and_measure(
        lm, target, text.tokens, text.validation, length, options.max_tokens, not options.balanced
    )
    loads = "equal loads" if options.balanced else "the loads of its own top-k"
    mean = ", ".join(f"{rate:g}" for rate in dict.fromkeys(rates))
    print(f"{options.model}: {before} -> thresholds for a mean of {mean} of {lm.num_experts}, with {loads}")
    print(f"calibrated on {outcome.num_tokens:,} tokens of {text.source}\n")
    print(outcome.table())
    facts = {"loads": loads, "text": text.source, "num_tokens": outcome.num_tokens, "sequence_length": length}
    report = {"model": name, "num_experts_per_token": rates, **facts, **outcome.to_json()}
    try:
        with atomic_folder(output_dir) as new:
            if options.with_model:
                copy_model(name, new)
            write_sidecar(new, lm, name, facts)
            (new / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: cannot be written: {error}") from error
    print(f"\nthresholds   {output_dir}")


def experts_per_layer(lm: TransformersLM, asked: Sequence[float] | None) -> list[float]:
    """Return the mean number of experts per token of each MoE layer.

    Args:
        lm: model.
        asked: value of ``--num_experts_per_token``; `None` keeps what the layers have.

    Raises:
        UserError: there are not as many numbers as layers, or one is more than there are experts.
    """
    if asked is None:
        return [float(layer.state.num_experts_per_token) for layer in lm.layers]
    option = f"--num_experts_per_token {' '.join(f'{value:g}' for value in asked)}"
    rates = list(asked) * (len(lm.layers) if len(asked) == 1 else 1)
    if len(rates) != len(lm.layers):
        raise UserError(f"{option}: give one number, or one for each of the {len(lm.layers)} MoE layers.")
    if max(rates) > lm.num_experts:
        raise UserError(f"{option}: must be above 0 and at most num_experts={lm.num_experts}.")
    return rates
