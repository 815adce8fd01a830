"""``plan``: parameters, memory, time and cost of a run, from its configuration alone."""

from __future__ import annotations

import argparse
from typing import Any

from lightning_moe.cli.arguments import at_least, command_parser, real_number
from lightning_moe.errors import UserError
from lightning_moe.report.tables import text_table

DESCRIPTION = """\
Print parameters, FLOPs, memory per GPU, time and cost of a run. Nothing is trained or allocated. --config and
--key=value are those of fit. docs/plan.md says how each number is found."""

GB = 1e9


def run(command: str, args: list[str]) -> None:
    """Print the plan.

    Raises:
        UserError: a configuration, GPU or number that does not fit.
        SystemExit: code 2 on a wrong option, 0 after ``--help``.
    """
    options, rest = _parser(command).parse_known_args(args)
    from lightning_moe.devices import find_device
    from lightning_moe.model import DecoderConfig, model_size
    from lightning_moe.optim import OptimizerConfig
    from lightning_moe.plan import STRATEGIES, memory_plan, saved_activations
    from lightning_moe.routing import rule_from_config
    from lightning_moe.training.parse import parse
    from lightning_moe.training.request import read_request

    device = find_device(options.gpu)
    request = read_request("fit", rest)
    config: Any = parse(request.layers, request.flags).config
    if config.model.pretrained.path is not None:
        raise UserError(f"model.pretrained.path={config.model.pretrained.path}: plan counts models that are made here")
    decoder = DecoderConfig(**config.model.decoder.as_dict())
    rule = rule_from_config(None if config.model.routing is None else config.model.routing.as_dict())
    precision = str(config.trainer.precision or "32-true")
    num_gpus = options.num_gpus or _num_gpus(config.trainer)
    micro_batch = _micro_batch(config, num_gpus)
    size = model_size(decoder, rule)
    saved = saved_activations(decoder, rule, micro_batch, precision)
    print(
        f"parameters  {size.total_parameters / 1e6:.1f}M in all, {size.active_parameters / 1e6:.1f}M active per token\n"
        f"FLOPs       {size.flops_per_token:.3e} per token in training, on active parameters"
    )
    _print_time(options, config, num_gpus, size.flops_per_token, device.peak(precision), device.source)
    print(
        f"\nmemory per GPU in GB (10⁹ bytes), {num_gpus} × {options.gpu}, {micro_batch} sequences of "
        f"{decoder.max_sequence_length} tokens at a time, {precision}\n"
    )
    stored = ["parameters", "gradients", "optimizer", "exchange", "activations", "total"]
    table = [["", *stored, "exchange", "recomputed", "total"]]
    for strategy in STRATEGIES:
        if strategy == "expert_parallel" and (rule is None or options.expert_parallel_size == 1):
            continue
        plan = memory_plan(
            decoder,
            rule,
            OptimizerConfig(**config.model.optimizer.as_dict()),
            saved,
            precision,
            strategy,
            num_gpus,
            options.expert_parallel_size,
        )
        values = [plan.parameters, plan.gradients, plan.optimizer, plan.communication, plan.activations]
        values += [plan.total(False), plan.communication_checkpointed, plan.activations_checkpointed, plan.total(True)]
        marks = ["*" if index in (5, 8) and value > device.memory else " " for index, value in enumerate(values)]
        cells = [f"{value / GB:.3f}{mark}" for value, mark in zip(values, marks, strict=True)]
        table.append([strategy, *cells])
    print(text_table(table, right=range(1, len(table[0]))))
    print(
        "\nrecomputed: activations under model.decoder.activation_checkpointing=true, with their exchange and total"
        f"\n*: more than the {device.memory / GB:g} GB of the {options.gpu}"
    )


def _print_time(options: Any, config: Any, num_gpus: int, flops_per_token: int, peak: float, source: str) -> None:
    tokens = config.trainer.max_steps * config.data.global_batch_size * config.data.sequence_length
    if tokens <= 0:
        raise UserError(f"trainer.max_steps={config.trainer.max_steps}: must be above 0 for a plan.")
    flops = tokens * flops_per_token
    rate = num_gpus * peak * options.mfu
    hours = flops / rate / 3600
    print(
        f"            {flops:.3e} in all: {tokens:.3e} tokens in {config.trainer.max_steps} steps\n"
        f"time        {hours:.4g} h on {num_gpus} × {options.gpu} at {options.mfu:.0%} of {peak / 1e12:g} TFLOP/s "
        f"({source}): {rate / flops_per_token:.4g} tokens/s\n"
        f"            up to {hours * 4 / 3:.4g} h with activation checkpointing (one more forward pass)"
    )
    if options.hours is not None:
        needed = tokens / options.hours / 3600
        print(
            f"within      {options.hours:g} h: {needed:.4g} tokens/s, "
            f"{needed * flops_per_token / num_gpus / peak:.1%} of the peak of each GPU"
        )
    if options.price is not None:
        print(f"cost        {hours * num_gpus * options.price:.2f} at {options.price:g} per GPU hour")


def _parser(command: str) -> argparse.ArgumentParser:
    usage = f"python -m lightning_moe {command} [--config FILE] … [--key=value] … [--gpu NAME] …"
    parser = command_parser(command, DESCRIPTION, usage=usage)
    parser.add_argument(
        "--gpu", default="H100", metavar="NAME", help="a GPU of the table in docs/plan.md (default: H100)"
    )
    parser.add_argument(
        "--num_gpus", type=at_least(1), metavar="N", help="number of GPUs (default: the trainer's devices, or 1)"
    )
    parser.add_argument(
        "--expert_parallel_size",
        type=at_least(1),
        default=1,
        metavar="N",
        help="number of GPUs that share the experts of a layer (default: 1)",
    )
    parser.add_argument(
        "--mfu", type=_share, default=0.4, help="model FLOPs utilisation, above 0 up to 1 (default: 0.4)"
    )
    parser.add_argument(
        "--hours", type=real_number(0, open_low=True), help="also print the tokens per second that this wall time takes"
    )
    parser.add_argument(
        "--price",
        type=real_number(0, open_low=True),
        help="price of a GPU hour, in any currency: also print the cost of the run",
    )
    return parser


def _num_gpus(trainer: Any) -> int:
    devices = trainer.devices
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    if isinstance(devices, list):
        devices = len(devices)
    return devices * trainer.num_nodes if isinstance(devices, int) and devices > 0 else 1


def _micro_batch(config: Any, num_gpus: int) -> int:
    batch, accumulated = config.data.global_batch_size, config.trainer.accumulate_grad_batches
    micro_batch, left = divmod(batch, num_gpus * accumulated)
    if left or not micro_batch:
        raise UserError(
            f"data.global_batch_size={batch}: must be a multiple of {num_gpus} GPUs × "
            f"trainer.accumulate_grad_batches={accumulated}."
        )
    return int(micro_batch)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and at most 1")
    return value
