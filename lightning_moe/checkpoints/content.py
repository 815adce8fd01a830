"""What a checkpoint holds, key by key, and the comparison of a file with that.

A checksum says that a file is what was written. Another program, or a person, may have written something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, get_args, get_origin, get_type_hints

import torch
from annotated_types import Interval, Len
from packaging.version import InvalidVersion, Version
from pydantic import InstanceOf
from torch import Tensor
from typing_extensions import TypedDict

from lightning_moe.errors import UserError
from lightning_moe.file_schema import check, short
from lightning_moe.internals.lightning import LoopStates, optimizer_steps_of
from lightning_moe.model import DecoderConfig
from lightning_moe.optim import OptimizerConfig, ScheduleConfig

Whole = Annotated[int, Interval(ge=0, lt=2**62)]
Tensors = dict[str, InstanceOf[Tensor]]


class Routing(TypedDict):
    """What `RoutingRule.to_config` returns."""

    class_path: str
    init_args: NotRequired[dict[str, Any]]


class HyperParameters(TypedDict):
    """What `LanguageModel.from_hyperparameters` takes."""

    decoder: dict[str, Any]
    routing: Routing | None
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    pretrained: NotRequired[Pretrained | None]


class Pretrained(TypedDict):
    """What `hf.healing.Healing.description` returns."""

    path: str
    digest: str
    num_experts_per_token: float | None
    train: list[str]
    distill: float
    temperature: float
    thresholds: str | None
    dtype: Literal["float32", "bfloat16"]
    lora_rank: int


class Released(TypedDict):
    """What `hf.healing.Healing.sizes` returns, in the place of a decoder's configuration."""

    vocab_size: Whole
    max_sequence_length: Whole
    num_experts: Whole
    num_experts_per_token: float | list[float]


Pretrained.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
Released.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]


class DataFacts(TypedDict):
    """What `TextDataModule.describe` says, as far as it is compared."""

    fingerprint: str
    tokenizer: str


class Stream(TypedDict):
    """What `data.streaming.PackedStream.state_dict` returns."""

    dataset: dict[str, Any]
    buffer: InstanceOf[Tensor]


class Data(TypedDict):
    """What `TextDataModule.state_dict` returns."""

    position: Whole
    global_step: Whole
    seed: NotRequired[int]
    data: DataFacts
    tokenizer: NotRequired[str]
    stream: NotRequired[Stream]


class OptimizerGroup(TypedDict):
    """A parameter group, whose parameters go by number."""

    params: list[Whole]


class OptimizerState(TypedDict):
    """What an optimizer's ``state_dict`` returns."""

    state: dict[Whole, Tensors]
    param_groups: list[OptimizerGroup]


class Scheduler(TypedDict):
    """What the learning-rate scheduler's ``state_dict`` returns; it takes over each key."""

    last_epoch: Whole
    base_lrs: NotRequired[list[float]]
    _step_count: NotRequired[Whole]
    _last_lr: NotRequired[list[float | InstanceOf[Tensor]]]
    _is_initial: NotRequired[bool]
    _get_lr_called_within_step: NotRequired[bool]
    lr_lambdas: list[dict[str, Any] | None]
    verbose: NotRequired[bool]  # of earlier versions of torch


Scheduler.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]


class Warmup(TypedDict):
    """What `ThresholdWarmup.state_dict` returns."""

    tokens_seen: Whole
    switched_at_step: Whole | None
    deviation: float | None
    window: list[float] | None
    window_steps: Whole


class Callbacks(TypedDict):
    ThresholdWarmup: NotRequired[Warmup]
    LoadBalance: NotRequired[dict[str, Tensors]]


class Segment(TypedDict):
    """A `config.settings.Segment`."""

    step: Whole
    changed: dict[str, Annotated[list[Any], Len(2, 2)]]


class Layout(TypedDict):
    """How a step's windows were divided."""

    world_size: Whole
    micro_batch_size: Whole


class Record(TypedDict):
    """What `training.continuing.to_checkpoint` returns."""

    config: str
    layout: Layout
    segments: list[Segment]


class Header(TypedDict):
    """A checkpoint without weights and optimizer state."""

    global_step: Whole
    hyper_parameters: HyperParameters
    epoch: NotRequired[Whole]
    loops: NotRequired[LoopStates]
    callbacks: NotRequired[dict[str, Any]]
    lr_schedulers: NotRequired[list[Scheduler]]
    TextDataModule: NotRequired[Data]
    run: NotRequired[Record]
    parameter_numbers: NotRequired[dict[str, Whole | None]]


class Weights(TypedDict):
    """What a file holds beside that."""

    state_dict: Tensors
    optimizer_states: NotRequired[list[OptimizerState]]


def check_header(content: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint whose content, apart from weights and optimizer state, is another one than is written.

    Raises:
        UserError: names the file, the first such key and its value.
    """
    where = str(path)
    if not isinstance(content, dict) or "hyper_parameters" not in content:
        raise UserError(f"{where}: not a checkpoint of this program (it has no 'hyper_parameters')")
    if isinstance(content["hyper_parameters"], dict) and "decoder" not in content["hyper_parameters"]:
        raise UserError(f"{where}: not written by lightning_moe (it has no model.decoder)")
    check(content, Header, where)
    check(content.get("callbacks", {}), Callbacks, f"{where}: callbacks")
    try:
        Version(content.get("pytorch-lightning_version", "2"))
    except (InvalidVersion, TypeError):
        found = short(content["pytorch-lightning_version"])
        raise UserError(f"{where}: pytorch-lightning_version={found}: must be a version, such as '2.6.6'") from None
    hyper_parameters = content["hyper_parameters"]
    if "vocab_size" not in hyper_parameters["decoder"]:  # of all sizes, the only one that is read by itself
        raise UserError(f"{where}: hyper_parameters.decoder.vocab_size: is missing")
    kinds: dict[str, type] = {"optimizer": OptimizerConfig, "schedule": ScheduleConfig}
    if hyper_parameters.get("pretrained") is None:
        kinds = {"decoder": DecoderConfig, **kinds}
    else:
        check(hyper_parameters["decoder"], Released, f"{where}: hyper_parameters.decoder")
    for key, kind in kinds.items():
        check(hyper_parameters[key], _fields(kind), f"{where}: hyper_parameters.{key}")
        try:
            kind(**hyper_parameters[key])
        except (UserError, ArithmeticError) as error:  # the latter: sizes that no float can hold
            raise UserError(f"{where}: hyper_parameters: {error}") from None
    steps = optimizer_steps_of(content["loops"]) if "loops" in content else None
    if steps is not None and steps != content["global_step"]:
        raise UserError(f"{where}: global_step={content['global_step']}: must be {steps}, as its loops say")


def check_content(content: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint with any other content than is written; see `check_header`.

    Whether the weights fit the model is left to `check_weights`, which needs the model.
    """
    check_header(content, path)
    check(content, Weights, str(path))
    for optimizer, scheduler in zip(
        content.get("optimizer_states", ()), content.get("lr_schedulers", ()), strict=False
    ):
        groups = len(optimizer["param_groups"])
        for key in ("base_lrs", "lr_lambdas"):
            if len(scheduler.get(key, [None] * groups)) != groups:
                found = f"lr_schedulers.0.{key}={short(scheduler[key])}"
                raise UserError(f"{path}: {found}: must have one entry for each of the {groups} parameter groups")


def check_weights(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights and routing state that are not those of a model.

    Args:
        expected: ``state_dict`` of the model; tensors without data will do.
        found: ``state_dict`` of a checkpoint.
        where: file of the checkpoint, for the message.

    Raises:
        UserError: names the first tensor that is missing, unknown, or of another shape or kind.
    """
    problem = next((f"{name}: is missing" for name in expected if name not in found), None)
    problem = problem or next((f"{name}: is no tensor of this model" for name in found if name not in expected), None)
    for name, tensor in found.items() if problem is None else ():
        model = expected[name]
        if tensor.shape != model.shape:
            problem = f"{name}: has the shape {list(tensor.shape)}; must be {list(model.shape)}"
        elif tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            problem = f"{name}: holds no plain numbers"
        elif _kind(tensor) != _kind(model):
            problem = f"{name}: is {tensor.dtype}; must be like {model.dtype}"
        if problem:
            break
    if problem:
        raise UserError(f"{where}: the weights do not fit the configuration: state_dict.{problem}")


def _kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


def check_size(decoder: Mapping[str, Any], found: Mapping[str, Tensor], where: str) -> None:
    """Refuse a configuration with more layers than the weights have, before the layers are built.

    Raises:
        UserError: names the number of layers.
    """
    layers = {name.split(".")[2] for name in found if name.startswith("decoder.blocks.")}
    if DecoderConfig(**decoder).num_layers != len(layers):
        raise UserError(
            f"{where}: hyper_parameters.decoder.num_layers={decoder.get('num_layers')}: its weights have {len(layers)}"
        )


def _fields(kind: type) -> Any:
    """Return the schema of a dataclass's fields as a mapping; a field may be missing, as in an older version."""
    hints = {
        name: NotRequired[hint | _as_list(hint) if get_origin(hint) is tuple else hint]
        for name, hint in get_type_hints(kind).items()
        if name in {field.name for field in dataclasses.fields(kind)}
    }
    if kind not in _SCHEMAS:
        _SCHEMAS[kind] = TypedDict(kind.__name__, hints)  # type: ignore[operator]
        _SCHEMAS[kind].__pydantic_config__ = {"extra": "forbid"}
    return _SCHEMAS[kind]


def _as_list(pair: Any) -> Any:
    """Return the type of a tuple as JSON has it."""
    members: Any = get_args(pair)
    many: Any = list[members[0]]
    return Annotated[many, Len(len(members), len(members))]


_SCHEMAS: dict[type, Any] = {}
