"""Sizes of a benchmark, the rows of its results, and the modules that it times."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.measurement import Measurement, interleaved
from lightning_moe.config.compose import find_config, load_layers, merge
from lightning_moe.errors import UserError
from lightning_moe.model import Decoder, DecoderConfig, MoELayer
from lightning_moe.model.layers import FeedForward
from lightning_moe.optim import OptimizerConfig, build_optimizer
from lightning_moe.routing import (
    ExpertChoice,
    ExpertThreshold,
    Phase,
    QuantileBalancing,
    RoutingRule,
    TokenChoice,
    rule_from_config,
)
from lightning_moe.routing.statistics import micro_batch_statistics, pool_statistics

Module = TypeVar("Module", bound=torch.nn.Module)
Cases = Mapping[str, Callable[[], object]]

RULES: dict[str, RoutingRule | None] = {
    "dense": None,
    "token choice": TokenChoice(),
    "quantile balancing": QuantileBalancing(),
    "expert choice": ExpertChoice(),
    "expert threshold": ExpertThreshold(),
}
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


def rule_called(name: str) -> RoutingRule | None:
    """Build the rule that ``--routing`` names.

    Args:
        name: name of a file under ``conf/routing``, a YAML file, or a class by its dotted path, with its defaults.

    Raises:
        UserError: there is no such file or class, or the class has options without a default.
    """
    if "." in name and not name.endswith(".yaml"):
        return rule_from_config({"class_path": name})
    data = merge(load_layers(find_config(name if "." in name else f"routing/{name}")))
    if "routing" not in (model := data.get("model") or {}):
        raise UserError(f"--routing {name}: the file has no model.routing.")
    routing = model["routing"]
    return rule_from_config({"class_path": routing} if isinstance(routing, str) else routing)


@dataclass(frozen=True)
class Setup:
    """Sizes and device.

    Args:
        hidden_size: hidden size of the layer, and of the decoder of whole steps.
        head_size: size of an attention head; narrower models have one head.
        num_tokens: number of tokens of a forward pass; a multiple of the sequence length, or fewer.
        sequence_length: length of a training window; fewer tokens make a shorter one.
        vocab_size: vocabulary of the decoder.
        num_experts: number of routed experts.
        num_layers: number of layers of the decoder.
        precision: precision in the trainer's words; ``bf16-mixed`` is autocast over fp32 weights.
        device: device to run on.
        rounds: number of rounds, see `interleaved`.
        routing: names of rules to add to `RULES`, see `rule_called`.
    """

    hidden_size: int = 512
    head_size: int = 64
    num_tokens: int = 4096
    sequence_length: int = 256
    vocab_size: int = 4096
    num_experts: int = 16
    num_layers: int = 4
    precision: str = "32-true"
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    rounds: int = 15
    routing: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_tokens > self.sequence_length and self.num_tokens % self.sequence_length:
            raise UserError(
                f"--num_tokens {self.num_tokens}: must be a multiple of --sequence_length {self.sequence_length}, or "
                "below it."
            )

    @property
    def rules(self) -> dict[str, RoutingRule | None]:
        """The rules to compare, by name; `None` stands for the dense model."""
        return {**RULES, **{name: rule_called(name) for name in self.routing}}

    def config(self, **options: object) -> DecoderConfig:
        sizes = {
            "hidden_size": self.hidden_size,
            "num_attention_heads": max(1, self.hidden_size // self.head_size),
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
            "vocab_size": self.vocab_size,
            "max_sequence_length": max(512, self.sequence_length),  # decoding needs 288
        }
        return DecoderConfig(**{**sizes, **options})  # type: ignore[arg-type]

    @property
    def batch_shape(self) -> tuple[int, int]:
        """Number of sequences, and of tokens of each."""
        length = min(self.sequence_length, self.num_tokens)
        return self.num_tokens // length, length

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and inputs."""
        return torch.bfloat16 if self.precision == "bf16-true" else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision != "bf16-mixed":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def place(self, module: Module) -> Module:
        return module.to(self.device, self.dtype)

    def tokens(self, batch: int, length: int) -> Tensor:
        """Return random ids, int64 [batch, length]."""
        return torch.randint(0, self.vocab_size, (batch, length), device=self.device)

    @property
    def layer_size(self) -> str:
        return f"d={self.hidden_size}, {self.num_tokens} tokens, {self.num_experts} + 1 experts"


#: the layer shapes of the paper's models with its context and vocabulary; d20 has only 4 layers, so that all compared
#: models fit into one GPU together
_PAPER = Setup(head_size=128, num_tokens=16384, sequence_length=2048, vocab_size=65536)
PRESETS = {
    "cpu": Setup(),
    "d12": replace(_PAPER, hidden_size=768, num_layers=12),
    "d20": replace(_PAPER, hidden_size=1280, num_layers=4),
    "small": Setup(hidden_size=384, num_tokens=65536, num_layers=8, vocab_size=8192),  # conf/model/small.yaml
}


@dataclass(frozen=True)
class Row:
    """One measured case.

    Args:
        comparison: name of its table.
        size: quantity that varies within the comparison, as text.
        case: name of the case.
        measured: measurement, with its ratio to the first case of the same comparison and size.
        extras: further numbers by name, such as tokens per second.
    """

    comparison: str
    size: str
    case: str
    measured: Measurement
    extras: Mapping[str, float] = field(default_factory=dict)


def timed(comparison: str, size: str, cases: Cases, setup: Setup, rounds: int | None = None) -> Iterator[Row]:
    """Yield rows of the cases' times; the others are divided by the first."""
    for name, measured in interleaved(cases, rounds or setup.rounds, setup.device).items():
        yield Row(comparison, size, name, measured)


def counted(comparison: str, size: str, values: Iterable[tuple[str, float]], unit: str) -> Iterator[Row]:
    """Yield rows of numbers without a spread."""
    base = None
    for name, value in values:
        base = value if base is None else base
        ratio = value / base if base else None
        yield Row(comparison, size, name, Measurement(value, unit, ratio, ratio, ratio))


def layer_input(setup: Setup) -> Tensor:
    """Return random [B, S, D] of unit mean square, as the norm before a layer gives."""
    return torch.randn(*setup.batch_shape, setup.hidden_size, device=setup.device, dtype=setup.dtype).requires_grad_()


def dense_layer(setup: Setup) -> FeedForward:
    """Build the dense layer of the MoE layer's active FLOPs."""
    config = setup.config()
    return setup.place(_filled(FeedForward(config.hidden_size, config.dense_size(1), config.activation)))


def moe_layer(setup: Setup, rule: RoutingRule) -> MoELayer:
    """Build an MoE layer whose thresholds fit its scores on random input."""
    moe = setup.place(_filled(MoELayer(setup.config(), rule, 1)))
    with torch.no_grad(), setup.autocast():
        moe(layer_input(setup))
    _update({"layer": moe})
    return moe


def decoder(setup: Setup, rule: RoutingRule | None) -> Decoder:
    """Build a decoder whose thresholds fit its scores on random tokens."""
    torch.manual_seed(0)
    model = setup.place(_filled(Decoder(setup.config(), rule)))
    ids = setup.tokens(8, min(256, setup.num_tokens))
    with torch.no_grad(), setup.autocast():
        for _ in range(setup.num_layers - 1):  # each pass makes the thresholds of one more layer right
            model(ids)
            update_state(model)
    return model


def update_state(model: Decoder) -> None:
    """Update all layers' routing state from the last forward pass."""
    _update({str(index): moe for index, moe in enumerate(model.moe_layers())})


@torch.no_grad()
def _update(layers: dict[str, MoELayer]) -> None:
    if not layers:
        return
    states = {name: moe.state for name, moe in layers.items()}
    parts = {name: micro_batch_statistics(moe.record, moe.state) for name, moe in layers.items() if moe.record}
    for name, statistics in pool_statistics(states, [parts]).items():
        states[name].update(statistics)


def layer_pass(module: torch.nn.Module, x: Tensor, setup: Setup) -> Callable[[], object]:
    """Return the forward and backward pass of a layer on ``x`` as a function."""
    weights = torch.randn_like(x)

    def run() -> None:
        module.zero_grad()
        x.grad = None
        with setup.autocast():
            y = module(x)
        y = y[0] if isinstance(y, tuple) else y
        torch.autograd.backward(y, weights.to(y.dtype))

    return run


def decoder_pass(model: Decoder, setup: Setup) -> Callable[[], object]:
    """Return the forward and backward pass of a decoder on random tokens as a function."""
    ids = setup.tokens(*setup.batch_shape)
    for moe in model.moe_layers():
        moe.train_phase = Phase.TRAIN

    def run() -> None:
        model.zero_grad()
        with setup.autocast():
            loss = model(ids, labels=ids).loss
        loss.backward()

    return run


def training_step(model: Decoder, setup: Setup, passes: int = 1) -> Callable[[], object]:
    """Return a training step as a function: forward and backward passes, routing state, AdamW at a rate of 0."""
    optimizer = build_optimizer(
        model, OptimizerConfig(matrix_rule="adamw", adamw_lr=0.0, embedding_lr=0.0, head_lr=0.0)
    )
    forward_backward = decoder_pass(model, setup)

    def run() -> None:
        for _ in range(passes):  # each begins without gradients, which the optimizer, at a rate of 0, does not mind
            forward_backward()
        update_state(model)
        optimizer.step()

    return run


def partials(calls: Mapping[str, tuple[Any, ...]]) -> dict[str, Callable[[], object]]:
    """Make a case for each name of a function and its arguments."""
    return {name: functools.partial(call[0], *call[1:]) for name, call in calls.items()}


def _filled(module: Module) -> Module:
    """Initialise a module, with random numbers in the place of zero weights, as after some training."""
    for child in module.modules():
        reset = getattr(child, "reset_parameters", None)
        if reset is not None:
            reset()
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=parameter.shape[-2] ** -0.5)
    return module
