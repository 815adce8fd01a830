"""One MoE layer: against a dense network and other implementations, its memory, and how its cost grows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.alternatives import ALTERNATIVES
from benchmarks.loss import loss_memory
from benchmarks.measurement import peak_memory, require_close
from benchmarks.setup import (
    Cases,
    Row,
    Setup,
    counted,
    dense_layer,
    layer_input,
    layer_pass,
    moe_layer,
    timed,
)
from benchmarks.transformers_models import IMPLEMENTATIONS, TransformersExperts, transformers_version
from lightning_moe.model import MoELayer
from lightning_moe.model.routed import grouped_outer, grouped_product
from lightning_moe.routing import ExpertThreshold


def layer(setup: Setup) -> Iterator[Row]:
    """Time each rule, and other ways to compute it, against a dense network of equal FLOPs, forward and backward."""
    x = layer_input(setup)
    cases = {name: layer_pass(module, x, setup) for name, module in implementations(setup, x).items()}
    yield from timed("layer, forward + backward", setup.layer_size, cases, setup)


def products(setup: Setup) -> Iterator[Row]:
    """Time the routed experts' products alone, with equal loads, against one product of all rows with one weight.

    ``bmm`` makes the same products in one call, which equal loads allow. Shapes: M rows, E experts, D hidden size, F
    hidden size of an expert.
    """
    config = setup.config()
    num_experts, rows = setup.num_experts, max(1, setup.num_tokens // setup.num_experts)
    dtype = torch.float32 if setup.precision == "32-true" else torch.bfloat16
    weight = torch.randn(num_experts, config.hidden_size, config.expert_size, dtype=setup.dtype, device=setup.device)
    x = torch.randn(num_experts * rows, config.hidden_size, dtype=dtype, device=setup.device)  # [M, D]
    dy = torch.randn(num_experts * rows, config.expert_size, dtype=dtype, device=setup.device)  # [M, F]
    offsets = torch.arange(1, num_experts + 1, dtype=torch.int32, device=setup.device) * rows
    x_batch, dy_batch = x.view(num_experts, rows, -1), dy.view(num_experts, rows, -1)
    size = f"{num_experts} x {rows} rows"
    kinds: dict[str, Cases] = {
        "forward": {
            "one product": lambda: x @ weight[0].to(dtype),
            "experts": lambda: grouped_product(x, weight, offsets),
            "bmm": lambda: x_batch @ weight.to(dtype),
        },
        "gradient of the input": {
            "one product": lambda: dy @ weight[0].to(dtype).mT,
            "experts": lambda: grouped_product(dy, weight.mT, offsets),
            "bmm": lambda: dy_batch @ weight.to(dtype).mT,
        },
        "gradient of the weights": {
            "one product": lambda: (x.mT @ dy).to(setup.dtype),
            "experts": lambda: grouped_outer(x, dy, offsets, setup.dtype),
            "bmm": lambda: (x_batch.mT @ dy_batch).to(setup.dtype),
        },
    }
    for kind, cases in kinds.items():
        found: Any = cases["experts"]()
        expected: Any = cases["bmm"]()
        require_close(found, expected.view_as(found), setup.precision, f"products, {kind}")
        yield from timed(f"products, {kind}", size, cases, setup)


def memory(setup: Setup) -> Iterator[Row]:
    """Measure bytes above weights and input, between forward and backward pass and at the peak (with gradients).

    Head and loss, whose logits may be the largest tensors of a step, have a table of their own.
    """
    x = layer_input(setup)
    modules = implementations(setup, x)
    held = [(name, _held(module, x, setup)) for name, module in modules.items()]
    yield from counted("memory held for the backward pass", setup.layer_size, held, "bytes")
    peaks = []
    for name, module in modules.items():
        run = layer_pass(module, x, setup)
        run()
        module.zero_grad()
        x.grad = None
        peaks.append((name, peak_memory(run, setup.device)))
    yield from counted("peak memory, forward + backward", setup.layer_size, peaks, "bytes")
    yield from loss_memory(setup)


def scaling(setup: Setup) -> Iterator[Row]:
    """Time the layer against the number of tokens, and against that of experts at equal active FLOPs."""
    for num_tokens in (1024, 4096, 16384):
        at = replace(setup, num_tokens=num_tokens, sequence_length=math.gcd(num_tokens, setup.sequence_length))
        cases = {"dense": layer_pass(dense_layer(at), layer_input(at), at)}
        cases["expert threshold"] = layer_pass(moe_layer(at, ExpertThreshold()), layer_input(at), at)
        yield from timed("layer against tokens", f"{num_tokens} tokens", cases, at)
    cases = {}
    for num_experts in (8, 16, 32, 64):
        at = replace(setup, num_experts=num_experts)
        cases[f"{num_experts} experts"] = layer_pass(moe_layer(at, ExpertThreshold()), layer_input(at), at)
    yield from timed("layer against experts", f"{setup.num_tokens} tokens", cases, setup)


def implementations(setup: Setup, x: Tensor) -> dict[str, nn.Module]:
    """Return the dense layer, and each rule followed by the alternatives, after a check that they compute the same."""
    modules: dict[str, nn.Module] = {}
    for name, rule in setup.rules.items():
        if rule is None:
            modules[name] = dense_layer(setup)
            continue
        moe = modules[name] = moe_layer(setup, rule)
        others: dict[str, Callable[[], nn.Module]] = {}
        if name == "expert threshold":
            others = {other: lambda moe=moe, kind=kind: kind(moe) for other, kind in ALTERNATIVES.items()}  # type: ignore[misc]
        elif name == "token choice" and transformers_version() is not None:
            others = {
                f"transformers {kind}": lambda moe=moe, kind=kind: TransformersExperts(moe, kind, setup)  # type: ignore[misc]
                for kind in IMPLEMENTATIONS
            }
        for other, build in others.items():
            modules[f"{name}, {other}"] = alternative = build()
            _require_equal(moe, alternative, x, setup, other)
    return modules


def _require_equal(moe: MoELayer, alternative: nn.Module, x: Tensor, setup: Setup, name: str) -> None:
    with torch.no_grad(), setup.autocast():
        expected, found = moe(x)[0], alternative(x)
    require_close(found, expected, setup.precision, name)


def _held(module: nn.Module, x: Tensor, setup: Setup) -> int:
    """Return the bytes that a forward pass leaves allocated while its result lives."""
    kept: list[object] = []

    def forward() -> None:
        with setup.autocast():
            kept.append(module(x))

    forward()  # lasting allocations of a first call
    kept.clear()
    return peak_memory(forward, setup.device, at_end=True)
