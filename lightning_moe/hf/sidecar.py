"""Thresholds for a released model, in a small folder beside it: ``routing.safetensors`` and ``routing.json``.

The first holds the routing state of each MoE layer in fp32, the second what it belongs to: name of the model, digest of
its routers, experts per token. The two files may also lie in the folder of a model itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt
from typing_extensions import TypedDict

from lightning_moe.errors import UserError
from lightning_moe.file_schema import read_json
from lightning_moe.routing import ExpertThreshold

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_moe.hf.model import TransformersLM

SIDECAR_FILE, STATE_FILE = "routing.json", "routing.safetensors"


class _Record(TypedDict):
    """Content of ``routing.json``."""

    model: str
    routers: str
    dtype: str
    num_experts: int
    num_experts_per_token: dict[str, Annotated[float, Gt(0)]]
    log_probabilities: bool
    facts: dict[str, Any]


@dataclass(frozen=True)
class Sidecar:
    """Thresholds of a model.

    Args:
        folder: folder of the two files.
        model: name or folder of the model that they belong to.
        routers: digest of that model's routers, see `routers_digest`.
        dtype: dtype of that model's weights, such as ``bfloat16``.
        num_experts: number E of routed experts of each layer.
        num_experts_per_token: name of a layer → mean experts per token that it was calibrated for.
        log_probabilities: whether thresholds compare log-probabilities instead of logits.
        state: ``<layer>.<buffer>`` → buffer of the routing state.
        facts: what else is on record, such as the text of the calibration.
    """

    folder: Path
    model: str
    routers: str
    dtype: str
    num_experts: int
    num_experts_per_token: Mapping[str, float]
    log_probabilities: bool
    state: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def is_sidecar(folder: Path) -> bool:
    """Return whether a folder holds thresholds."""
    return (folder / SIDECAR_FILE).is_file()


def routers_digest(lm: TransformersLM) -> str:
    """Return a digest of the weights of all routers, by which thresholds know their model."""
    import torch

    digest = hashlib.sha256()
    for name, layer in lm.named_layers():
        digest.update(name.encode())
        for tensor in layer.router.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def write_sidecar(folder: Path, lm: TransformersLM, model: str, facts: Mapping[str, Any]) -> None:
    """Write the thresholds of a model into an existing folder.

    Args:
        folder: folder, with or without other files.
        lm: model whose layers route by `ExpertThreshold`.
        model: name or folder of the model.
        facts: what else shall be on record, as plain data.
    """
    import json

    from safetensors.torch import save_file

    state = {
        f"{name}.{key}": buffer.detach().cpu().contiguous().clone()
        for name, layer in lm.named_layers()
        for key, buffer in layer.state.named_buffers()
    }
    local = Path(model).expanduser()
    record: _Record = {
        "model": str(local.resolve()) if local.exists() else model,
        "routers": routers_digest(lm),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "num_experts": lm.num_experts,
        "num_experts_per_token": {name: float(layer.state.num_experts_per_token) for name, layer in lm.named_layers()},
        "log_probabilities": all(layer.log_probabilities for layer in lm.layers),
        "facts": dict(facts),
    }
    save_file(state, folder / STATE_FILE)
    (folder / SIDECAR_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_sidecar(folder: Path) -> Sidecar:
    """Read thresholds.

    Raises:
        UserError: a file is missing, or is none that `write_sidecar` wrote.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    record = read_json(folder / SIDECAR_FILE, _Record)
    try:
        state = load_file(folder / STATE_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / STATE_FILE}: cannot be read: {error}") from None
    return Sidecar(folder=folder, state=state, **record)


def use_sidecar(lm: TransformersLM, sidecar: Sidecar) -> None:
    """Let a model route by thresholds.

    Raises:
        UserError: the thresholds belong to another model.
    """
    import torch

    where = sidecar.folder / SIDECAR_FILE
    found, expected = sorted(lm.moe), sorted(sidecar.num_experts_per_token)
    if found != expected or sidecar.num_experts != lm.num_experts:
        raise UserError(
            f"{where}: holds thresholds for {sidecar.num_experts} experts in layers {', '.join(expected)}, but the "
            f"model has {lm.num_experts} in layers {', '.join(found)}: they belong to another model."
        )
    dtype = str(lm.model.dtype).removeprefix("torch.")
    if sidecar.routers != routers_digest(lm) and sidecar.dtype != dtype:
        raise UserError(
            f"{where}: was made for the model in {sidecar.dtype}, but this one is in {dtype}, with other routers: "
            f"give --dtype {sidecar.dtype}, or calibrate again with --dtype {dtype}."
        )
    if sidecar.routers != routers_digest(lm):
        raise UserError(
            f"{where}: was made for routers {sidecar.routers}, but those of this model are {routers_digest(lm)}: they "
            f"belong to another model (made for {sidecar.model})."
        )
    rule = ExpertThreshold()
    states: dict[str, dict[str, Tensor]] = {}
    for name, rate in sidecar.num_experts_per_token.items():
        if rate > lm.num_experts:
            raise UserError(f"{where}: num_experts_per_token: {name}: {rate:g}: must be at most {lm.num_experts}.")
        states[name] = {}
        for key, initial in rule.initial_state(lm.num_experts, rate).items():
            value = sidecar.state.get(f"{name}.{key}")
            if value is None or value.shape != initial.shape or not bool(torch.isfinite(value).all()):
                raise UserError(
                    f"{sidecar.folder / STATE_FILE}: {name}.{key}: must be finite numbers of shape "
                    f"{list(initial.shape)}"
                )
            states[name][key] = value
    for name, layer in lm.named_layers():  # only now: a refused sidecar changes nothing
        layer.route_by(rule, sidecar.num_experts_per_token[name])
        layer.log_probabilities = sidecar.log_probabilities
        for key, value in states[name].items():
            layer.state[key].copy_(value)
        layer.state.was_updated = True
