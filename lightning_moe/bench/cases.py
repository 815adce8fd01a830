"""The comparisons of ``bench``. Each returns rows: what was compared, at which size, and the timing of every case."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from lightning_moe.bench.alternatives import ALTERNATIVES
from lightning_moe.bench.timing import Timing, interleaved
from lightning_moe.callbacks.routing_state_update import observe, pool_statistics
from lightning_moe.metrics import LoadBalanceMetric
from lightning_moe.model import Decoder, DecoderConfig, MoELayer, generate, next_token_loss
from lightning_moe.model.layers import FeedForward
from lightning_moe.optim import OptimizerConfig, build_optimizer
from lightning_moe.routing import ExpertChoice, ExpertThreshold, Phase, QuantileBalancing, RoutingRule, TokenChoice

Module = TypeVar("Module", bound=torch.nn.Module)

RULES: dict[str, RoutingRule | None] = {
    "dense": None,
    "token choice": TokenChoice(),
    "quantile balancing": QuantileBalancing(),
    "expert choice": ExpertChoice(),
    "expert threshold": ExpertThreshold(),
}


@dataclass(frozen=True)
class Setup:
    """Sizes and where to run.

    Args:
        hidden_size: of the layer, and of the decoder of whole steps.
        num_tokens: of a forward pass.
        num_experts: routed experts.
        num_layers: of the decoder of whole steps and of decoding.
        dtype: ``float32``, or ``bfloat16`` under autocast.
        device: where.
        rounds: see `interleaved`.
    """

    hidden_size: int = 512
    num_tokens: int = 4096
    num_experts: int = 16
    num_layers: int = 4
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    rounds: int = 15

    @property
    def sequence_length(self) -> int:
        return min(256, self.num_tokens)

    def config(self, **options: object) -> DecoderConfig:
        sizes = {
            "hidden_size": self.hidden_size,
            "num_attention_heads": max(1, self.hidden_size // 64),
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
            "vocab_size": 4096,
            "max_sequence_length": max(256, self.sequence_length),
        }
        return DecoderConfig(**{**sizes, **options})  # type: ignore[arg-type]

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """bf16 as training uses it."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


@dataclass(frozen=True)
class Row:
    """One measured case.

    Args:
        comparison: which of the tables below.
        size: what varies within the comparison, as text.
        case: what was timed.
        timing: against the comparison's baseline of the same size.
    """

    comparison: str
    size: str
    case: str
    timing: Timing


def layer(setup: Setup) -> Iterator[Row]:
    """Forward and backward pass of one layer: each rule, and other ways to compute it, against a dense network."""
    x = _input(setup)
    cases: dict[str, Callable[[], object]] = {}
    for name, rule in RULES.items():
        module = _dense(setup) if rule is None else _layer(setup, rule)
        cases[name] = _forward_backward(module, x, setup)
        if isinstance(rule, ExpertThreshold):
            assert isinstance(module, MoELayer)
            for other, kind in ALTERNATIVES.items():
                alternative = kind(module)
                _require_equal(module, alternative, x, other)
                cases[f"{name}, {other}"] = _forward_backward(alternative, x, setup)
    yield from _rows("layer, forward + backward", _size(setup), cases, setup)


def step(setup: Setup) -> Iterator[Row]:
    """Forward, backward, optimizer and routing state of a decoder, against the dense one of equal active FLOPs."""
    cases = {name: _training_step(setup, rule) for name, rule in RULES.items()}
    yield from _rows("training step", _size(setup), cases, replace(setup, rounds=max(3, setup.rounds // 2)))


def decoding(setup: Setup) -> Iterator[Row]:
    """32 tokens with the cache behind a prompt of 32; and the prompt alone."""
    decoders = {name: _decoder(setup, rule).eval() for name, rule in RULES.items() if name in _DECODED}
    rounds = max(3, setup.rounds // 2)
    for batch in (1, 8, 64):
        prompt = torch.randint(0, 4096, (batch, 32), device=setup.device)
        cases = {name: _generate(setup, decoder, prompt) for name, decoder in decoders.items()}
        yield from _rows("decoding, 32 tokens", f"batch {batch}", cases, replace(setup, rounds=rounds))
    prompt = torch.randint(0, 4096, (8, 256), device=setup.device)
    cases = {name: _prefill(setup, decoder, prompt) for name, decoder in decoders.items()}
    yield from _rows("prefill", "batch 8, 256 tokens", cases, replace(setup, rounds=rounds))


_DECODED = ("dense", "token choice", "expert threshold")


def scaling(setup: Setup) -> Iterator[Row]:
    """One layer against tokens (per token), and against the number of experts at equal active FLOPs."""
    for num_tokens in (1024, 4096, 16384):
        at = replace(setup, num_tokens=num_tokens)
        cases = {"dense": _forward_backward(_dense(at), _input(at), at)}
        cases["expert threshold"] = _forward_backward(_layer(at, ExpertThreshold()), _input(at), at)
        yield from _rows("layer against tokens", f"{num_tokens} tokens", cases, at)
    cases = {}
    for num_experts in (8, 16, 32, 64):
        at = replace(setup, num_experts=num_experts)
        cases[f"{num_experts} experts"] = _forward_backward(_layer(at, ExpertThreshold()), _input(at), at)
    yield from _rows("layer against experts", f"{setup.num_tokens} tokens", cases, setup)


def overhead(setup: Setup) -> Iterator[Row]:
    """What one update of all thresholds, and the load metrics, take of a training step; and against the tokens."""
    for num_tokens in (setup.num_tokens, 4 * setup.num_tokens):
        at = replace(setup, num_tokens=num_tokens)
        decoder = _decoder(at, ExpertThreshold())
        train = _training_step(at, ExpertThreshold(), decoder)
        train()
        metrics = [LoadBalanceMetric(at.num_experts).to(at.device) for _ in decoder.moe_layers()]

        def update_metrics(decoder: Decoder = decoder, metrics: list[LoadBalanceMetric] = metrics) -> None:
            for metric, moe in zip(metrics, decoder.moe_layers(), strict=True):
                assert moe.record is not None
                metric.update(moe.record.selection, None)

        cases: dict[str, Callable[[], object]] = {
            "training step": train,
            "threshold update": functools.partial(_update_state, decoder),
            "load metrics": update_metrics,
        }
        few = replace(at, rounds=max(3, setup.rounds // 3))
        yield from _rows("overhead", f"{setup.num_layers} layers, {num_tokens} tokens", cases, few)


COMPARISONS: dict[str, Callable[[Setup], Iterator[Row]]] = {
    "layer": layer,
    "step": step,
    "decoding": decoding,
    "scaling": scaling,
    "overhead": overhead,
}


def _rows(comparison: str, size: str, cases: dict[str, Callable[[], object]], setup: Setup) -> Iterator[Row]:
    for name, timing in interleaved(cases, next(iter(cases)), setup.rounds, setup.device).items():
        yield Row(comparison, size, name, timing)


def _size(setup: Setup) -> str:
    return f"d={setup.hidden_size}, {setup.num_tokens} tokens, {setup.num_experts} + 1 experts"


def _input(setup: Setup) -> Tensor:
    """fp32 [B, S, D] of unit mean square, as behind the norm in front of a layer."""
    shape = (setup.num_tokens // setup.sequence_length, setup.sequence_length, setup.hidden_size)
    return torch.randn(shape, device=setup.device).requires_grad_()


def _dense(setup: Setup) -> FeedForward:
    config = setup.config()
    return _filled(FeedForward(config.hidden_size, config.dense_size(1), config.activation)).to(setup.device)


def _layer(setup: Setup, rule: RoutingRule) -> MoELayer:
    """With thresholds that fit its scores on random input."""
    moe = _filled(MoELayer(setup.config(), rule, 1)).to(setup.device)
    moe(_input(setup))
    with torch.no_grad():
        rule.update(moe.state, pool_statistics({"layer": moe}, [{"layer": observe(moe)}])["layer"])
    return moe


def _decoder(setup: Setup, rule: RoutingRule | None) -> Decoder:
    torch.manual_seed(0)
    decoder = _filled(Decoder(setup.config(), rule)).to(setup.device)
    ids = torch.randint(0, 4096, (8, 256), device=setup.device)
    with torch.no_grad():
        for _ in range(3):  # each pass settles the thresholds of one more layer
            decoder(ids)
            _update_state(decoder)
    return decoder


def _filled(module: Module) -> Module:
    """No weight at zero, as after some training."""
    for child in module.modules():
        reset = getattr(child, "reset_parameters", None)
        if reset is not None:
            reset()
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=parameter.shape[-2] ** -0.5)
    return module


def _update_state(decoder: Decoder) -> None:
    layers = {str(index): moe for index, moe in enumerate(decoder.moe_layers())}
    if not layers:
        return
    with torch.no_grad():
        statistics = pool_statistics(layers, [{name: observe(moe) for name, moe in layers.items()}])
        for name, moe in layers.items():
            moe.rule.update(moe.state, statistics[name])


def _forward_backward(module: torch.nn.Module, x: Tensor, setup: Setup) -> Callable[[], object]:
    weights = torch.randn_like(x)

    def run() -> None:
        module.zero_grad()
        x.grad = None
        with setup.autocast():
            y = module(x)
        y = y[0] if isinstance(y, tuple) else y
        torch.autograd.backward(y, weights.to(y.dtype))

    return run


def _require_equal(module: MoELayer, alternative: torch.nn.Module, x: Tensor, name: str) -> None:
    with torch.no_grad():
        expected, found = module(x)[0], alternative(x)
    error = float((expected - found).abs().max() / expected.abs().max())
    if error > 1e-4:
        raise AssertionError(f"{name} computes something else: largest relative difference {error:.2g}")


def _training_step(setup: Setup, rule: RoutingRule | None, decoder: Decoder | None = None) -> Callable[[], object]:
    decoder = decoder or _decoder(setup, rule)
    for moe in decoder.moe_layers():
        moe.train_phase = Phase.TRAIN
    optimizer = build_optimizer(
        decoder, OptimizerConfig(matrix_rule="adamw", adamw_lr=0.0, embedding_lr=0.0, head_lr=0.0)
    )
    shape = (setup.num_tokens // setup.sequence_length, setup.sequence_length)
    ids = torch.randint(0, 4096, shape, device=setup.device)

    def run() -> None:
        optimizer.zero_grad()
        with setup.autocast():
            output = decoder(ids)
            loss = next_token_loss(output.logits, ids).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        _update_state(decoder)
        optimizer.step()

    return run


def _generate(setup: Setup, decoder: Decoder, prompt: Tensor) -> Callable[[], object]:
    def run() -> None:
        with setup.autocast():
            generate(decoder, prompt, 32, temperature=0.0)

    return run


def _prefill(setup: Setup, decoder: Decoder, prompt: Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad(), setup.autocast():
            decoder(prompt, decoder.new_cache(prompt.shape[0]))

    return run
