"""Read what ``export`` or ``convert`` wrote: a folder for transformers, or one safetensors file.

A folder may have been saved again by transformers, which puts large weights into several files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from lightning_moe.errors import UserError
from lightning_moe.file_schema import parse_json, read_json, refuse_special
from lightning_moe.filenames import TOKENIZER_FILE

EXPORT_CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"  # instead of it, where there are several: name of a tensor → its file
SAFETENSORS_SUFFIX = ".safetensors"  # by which an export that is one file is known
ORIGIN_KEY = "lightning_moe"  # of config.json: `origin` of what the folder was made from
PREFIX = "decoder."  # of the names in a checkpoint, which the folder's weights lack


class Origin(TypedDict):
    """What `origin` returns."""

    step: int
    config: dict[str, Any]
    data: dict[str, Any]
    tokenizer: NotRequired[str]


class _Config(TypedDict):
    """The keys of config.json that are read here."""

    lightning_moe: Origin
    tie_word_embeddings: bool


class _Index(TypedDict):
    weight_map: dict[str, str]


def origin(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an export keeps of a checkpoint beside its tensors, as JSON can hold it: step, config, data."""
    return {
        "step": checkpoint["global_step"],
        "config": dict(checkpoint["hyper_parameters"]),
        "data": checkpoint.get("TextDataModule", {}).get("data", {}),
    }


def is_exported(path: Path) -> bool:
    """Return whether a path is meant as an export, which may be damaged."""
    return path.suffix == SAFETENSORS_SUFFIX if path.is_file() else (path / EXPORT_CONFIG_FILE).is_file()


def bundled_tokenizer(path: Path) -> str | None:
    """Return the tokenizer file of an exported folder, or `None`."""
    file = path / TOKENIZER_FILE
    return str(file) if is_exported(path) and file.is_file() else None


def read_exported(path: Path) -> dict[str, Any]:
    """Read an export as a checkpoint without optimizer state.

    Raises:
        UserError: the export is damaged, or another program wrote it.
    """
    try:
        source, weights = _folder(path) if path.is_dir() else _file(path)
        checkpoint = {
            "hyper_parameters": source["config"],
            "state_dict": weights,
            "optimizer_states": [],
            "global_step": source["step"],
            "epoch": 0,
            "pytorch-lightning_version": _lightning_version(),
        }
        if source["data"]:  # training starts at the beginning of the text
            checkpoint["TextDataModule"] = {"data": source["data"], "position": 0, "global_step": 0}
            if "tokenizer" in source:
                checkpoint["TextDataModule"]["tokenizer"] = source["tokenizer"]
    except UserError as error:
        raise UserError(f"{path}: not a whole export of lightning_moe: {error}") from error
    except _problems() as error:
        raise UserError(f"{path}: not a whole export of lightning_moe: {' '.join(repr(error).split())}") from error
    return checkpoint


def damage(path: Path) -> str | None:
    """Return what is wrong with an export, or `None`. Checks the sizes of its parts, not their content."""
    from safetensors import safe_open

    try:
        for file in _weight_files(path) if path.is_dir() else [path]:
            refuse_special(file)
            with safe_open(file, "np"):
                pass
    except _problems() as error:
        return f"damaged: {error}"
    return None


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a folder's weights; they may be missing."""
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        return [folder / WEIGHTS_FILE]
    files = set(read_json(index, _Index)["weight_map"].values())
    for name in files:
        if Path(name).name != name:
            raise UserError(f"{index}: {name!r} is not the name of a file in the folder")
    return [folder / name for name in sorted(files)]


def _folder(path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    from safetensors.torch import load_file

    config = read_json(path / EXPORT_CONFIG_FILE, _Config)
    files = _weight_files(path)
    for file in files:
        refuse_special(file)
    weights = {PREFIX + name: value for file in files for name, value in load_file(file).items()}
    if config["tie_word_embeddings"]:
        weights[f"{PREFIX}head.weight"] = weights[f"{PREFIX}embedding.weight"]
    return config["lightning_moe"], weights


def _file(path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    tokenizer = {"tokenizer": metadata["tokenizer"]} if "tokenizer" in metadata else {}
    facts = {"step": int, "config": dict[str, Any], "data": dict[str, Any]}
    missing = [key for key in facts if key not in metadata]
    if missing:
        raise UserError(f"its metadata have no {missing[0]!r}")
    return {key: parse_json(metadata[key], facts[key], key) for key in facts} | tokenizer, weights


def _lightning_version() -> str:
    """Return Lightning's version, which Lightning looks for before it loads a checkpoint."""
    from importlib.metadata import version

    return version("lightning")


def _problems() -> tuple[type[Exception], ...]:
    from safetensors import SafetensorError

    return OSError, ValueError, KeyError, TypeError, SafetensorError
