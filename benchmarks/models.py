"""Whole decoders: the training step, compilation, sequence length, decoding, and the cost of routing state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.measurement import host_waits, peak_memory
from benchmarks.setup import (
    RULES,
    Row,
    Setup,
    counted,
    decoder,
    decoder_pass,
    layer_input,
    layer_pass,
    moe_layer,
    partials,
    timed,
    training_step,
    update_state,
)
from benchmarks.transformers_models import IMPLEMENTATIONS, transformers_decoder, transformers_version
from lightning_moe.devices import device_that_prints
from lightning_moe.internals.torch import compile_with_sizes_that_depend_on_data
from lightning_moe.metrics.load_balance import LoadBalanceMetric
from lightning_moe.model import Decoder, generate, model_size
from lightning_moe.routing import ExpertThreshold, RoutingRule

NEW_TOKENS = 32
_FEW = ("dense", "token choice", "expert threshold")


def step(setup: Setup) -> Iterator[Row]:
    """Time forward, backward, optimizer and routing state, against the dense decoder of equal active FLOPs."""
    cases = {name: training_step(decoder(setup, rule), setup) for name, rule in setup.rules.items()}
    for row in timed("training step", _model_size(setup), cases, setup, _half(setup)):
        yield replace(row, extras=_rates(row, setup))


def step_costs(setup: Setup) -> Iterator[Row]:
    """Measure the peak memory of a training step, and how often the host waits for the device in it."""
    peaks, waits = [], []
    for name in (*_FEW, *setup.routing):
        run = training_step(decoder(setup, setup.rules[name]), setup)
        for _ in range(2):  # the first makes optimizer state and gradients
            run()
        peaks.append((name, peak_memory(run, setup.device)))
        waits.append((name, host_waits(run, setup.device)))
    yield from counted("peak memory, training step", _model_size(setup), peaks, "bytes")
    yield from counted("waits of the host, training step", _model_size(setup), waits, "waits")


def compiled(setup: Setup) -> Iterator[Row]:
    """Time a layer's pass and a training step, eager and compiled."""
    x = layer_input(setup)
    eager = moe_layer(setup, ExpertThreshold())
    fast = copy.deepcopy(eager)
    fast.record = None
    compile_with_sizes_that_depend_on_data()  # as `Decoder.compile_blocks`
    fast.compile()
    cases = {name: layer_pass(module, x, setup) for name, module in (("eager", eager), ("compiled", fast))}
    yield from timed("compiled layer, expert threshold", setup.layer_size, cases, setup)
    for name in ("dense", "expert threshold"):
        models = {how: decoder(setup, RULES[name]) for how in ("eager", "compiled")}
        models["compiled"].compile_blocks()
        cases = {how: training_step(model, setup) for how, model in models.items()}
        yield from timed(f"compiled training step, {name}", _model_size(setup), cases, setup, _half(setup))


def lengths(setup: Setup) -> Iterator[Row]:
    """Time the forward and backward pass of equally many tokens in windows of other lengths."""
    asked = {min(factor * setup.sequence_length, setup.num_tokens) for factor in (1, 4, 16)}
    for length in sorted(length for length in asked if setup.num_tokens % length == 0):
        at = replace(setup, sequence_length=length)
        cases = {name: decoder_pass(decoder(at, RULES[name]), at) for name in ("dense", "expert threshold")}
        size = f"{at.batch_shape[0]} windows of {at.batch_shape[1]} tokens"
        yield from timed("decoder against sequence length", size, cases, at, _half(setup))


def decoding(setup: Setup) -> Iterator[Row]:
    """Time 32 tokens with the cache after a prompt of 32, and a prompt of 256 alone."""
    runs: dict[str, Callable[[Tensor, int], object]] = {}
    for name in (*_FEW, *setup.routing):
        runs[name] = Decoding(setup, decoder(setup, setup.rules[name]).eval())
    for kind in IMPLEMENTATIONS if transformers_version() is not None else ():
        runs[f"token choice, transformers {kind}"] = _Theirs(setup, transformers_decoder(setup, kind))
    for batch in (1, 8, 64):
        prompt = setup.tokens(batch, 32)
        cases = partials({name: (run, prompt, NEW_TOKENS) for name, run in runs.items()})
        for row in timed(f"decoding, {NEW_TOKENS} tokens", f"batch {batch}", cases, setup, _half(setup)):
            yield replace(row, extras={"tokens_per_second": batch * NEW_TOKENS / row.measured.value})
    prompt = setup.tokens(8, 256)
    cases = partials({name: (run, prompt, 0) for name, run in runs.items()})
    yield from timed("prefill", "batch 8, 256 tokens", cases, setup, _half(setup))


def overhead(setup: Setup) -> Iterator[Row]:
    """Time one update of all thresholds, and the load metrics, against a training step and the number of tokens."""
    for num_tokens in (setup.num_tokens, 4 * setup.num_tokens):
        at = replace(setup, num_tokens=num_tokens, sequence_length=setup.batch_shape[1])
        model = decoder(at, ExpertThreshold())
        train = training_step(model, at)
        train()
        metrics = [LoadBalanceMetric(at.num_experts).to(at.device) for _ in model.moe_layers()]
        cases: dict[str, Callable[[], object]] = {"training step": train}
        cases |= partials(
            {"threshold update": (update_state, model), "load metrics": (_update_metrics, model, metrics)}
        )
        yield from timed(
            "overhead", f"{setup.num_layers} layers, {num_tokens} tokens", cases, at, max(3, setup.rounds // 3)
        )


def _update_metrics(model: Decoder, metrics: list[LoadBalanceMetric]) -> None:
    for metric, moe in zip(metrics, model.moe_layers(), strict=True):
        assert moe.record is not None
        metric.update(moe.record.selection, None)


class Decoding:
    """Decoding with our decoder; without new tokens, the prompt alone."""

    def __init__(self, setup: Setup, model: Decoder) -> None:
        self.setup, self.model = setup, model

    def __call__(self, prompt: Tensor, new_tokens: int) -> None:
        with torch.no_grad(), self.setup.autocast():
            if new_tokens:
                generate(self.model, prompt, new_tokens, temperature=0.0)
            else:
                self.model(prompt, self.model.new_cache(prompt.shape[0]), last_only=True)


class _Theirs:
    """Decoding with a model of `transformers`."""

    def __init__(self, setup: Setup, model: torch.nn.Module) -> None:
        self.setup, self.model = setup, model

    def __call__(self, prompt: Tensor, new_tokens: int) -> None:
        with torch.no_grad(), self.setup.autocast():
            if new_tokens:
                exactly = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
                self.model.generate(prompt, do_sample=False, pad_token_id=0, **exactly)  # type: ignore[operator]
            else:
                self.model(prompt, use_cache=True, logits_to_keep=1)


def _half(setup: Setup) -> int:
    return max(3, setup.rounds // 2)


def _model_size(setup: Setup) -> str:
    return f"{setup.num_layers} layers, {setup.layer_size}, vocabulary {setup.vocab_size}"


def _rates(row: Row, setup: Setup) -> dict[str, float]:
    """Return tokens per second, and the MFU."""
    rate = setup.num_tokens / row.measured.value
    return {"tokens_per_second": rate, **model_flops_utilisation(setup, setup.rules[row.case], rate)}


def model_flops_utilisation(setup: Setup, rule: RoutingRule | None, rate: float) -> dict[str, float]:
    """Return ``mfu``, the share of the device's peak that active FLOPs reach; empty if the peak is not known.

    Args:
        setup: sizes and device.
        rule: rule of the decoder; `None` for the dense one.
        rate: tokens per second of training.
    """
    known = device_that_prints(torch.cuda.get_device_name(setup.device)) if setup.device.type == "cuda" else None
    if known is None:
        return {}
    config = replace(setup.config(), max_sequence_length=setup.batch_shape[1])
    return {"mfu": rate * model_size(config, rule).flops_per_token / known.peak(setup.precision)}
