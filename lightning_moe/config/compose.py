"""Configuration files that compose: several ``--config``, ``include:`` inside a file, names under ``conf/``.

Files are merged before the command-line parser sees them. So a change of class replaces the previous class with its
arguments, and every key remembers its file. Interpolation (``${…}``) is left alone: it is resolved once, over all
files, defaults and flags.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import lightning_moe
from lightning_moe.config.yaml_text import load_yaml
from lightning_moe.errors import UserError, did_you_mean
from lightning_moe.user_paths import user_path

INCLUDE = "include"
DEEPEST_INCLUDE = 50
MOST_INCLUDES = 1_000
FLAG = "the command line"  # in messages, for a value from no file
#: top-level keys whose values are text, also where they look like numbers, dates or booleans
NAMES = ("run_name", "output_dir", "ckpt_path")


@dataclass(frozen=True)
class Layer:
    """The content of one configuration file, without what it includes.

    Args:
        path: path of the file.
        data: nested keys, without ``include``.
        includes: content of ``include``.
    """

    path: Path
    data: dict[str, Any]
    includes: tuple[str, ...] = ()


def conf_root() -> Path:
    """Return the folder of the packaged configuration: in the package in a wheel, ``conf/`` beside it in a checkout."""
    package = Path(lightning_moe.__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def find_config(name: str, folder: Path | None = None) -> Path:
    """Return the file that a ``--config`` value or an ``include`` entry means.

    The name is relative to ``folder`` (default: the working directory) or else to `conf_root`, so that
    ``routing/token_choice`` needs no path; ``.yaml`` may be left out.

    Raises:
        UserError: there is no such file.
    """
    roots, path = [folder or Path(), conf_root()], user_path(name, "configuration file")
    for root in roots:
        for candidate in (root / path, root / f"{path}.yaml"):
            if candidate.is_file():
                return candidate
    known = sorted(p.relative_to(conf_root()).with_suffix("").as_posix() for p in conf_root().rglob("*.yaml"))
    hint = did_you_mean(name.removesuffix(".yaml"), known, "the packaged ones are")
    raise UserError(f"configuration file {name!r} not found, nor with .yaml, in {roots[0].resolve()}: {hint}")


def load_layers(path: Path) -> list[Layer]:
    """Return a file and everything it includes, what is included first.

    Raises:
        UserError: unreadable file, content that is not a mapping, a missing include, or includes that form a cycle or
            are too many.
    """
    return _load(path, (), [])


def _load(path: Path, including: tuple[Path, ...], read: list[Path]) -> list[Layer]:
    """Return the layers of a file, which the files ``including`` include, after those already ``read``."""
    path = path.resolve()
    if path in including:
        chain = " → ".join(str(p) for p in (*including[including.index(path) :], path))
        raise UserError(f"{INCLUDE}: the files include each other in a circle: {chain}")
    read.append(path)
    if len(read) > MOST_INCLUDES:
        raise UserError(f"{path}: {INCLUDE}: more than {MOST_INCLUDES} files are included, each counted every time")
    if len(including) > DEEPEST_INCLUDE:
        raise UserError(f"{path}: {INCLUDE}: more than {DEEPEST_INCLUDE} files include each other in a row")
    layer = read_layer(path)
    layers: list[Layer] = []
    for name in layer.includes:
        try:
            included = find_config(name, path.parent)
        except (UserError, OSError) as error:
            raise UserError(f"{path}: {INCLUDE}: {error}") from None
        layers += _load(included, (*including, path), read)
    return [*layers, layer]


def read_layer(path: Path) -> Layer:
    """Read one file, without what it includes.

    Raises:
        UserError: it cannot be read, or is no mapping.
    """
    try:
        data = OmegaConf.to_container(load_yaml(path, NAMES), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a mapping of keys to values, found a {type(data).__name__}")
    nested = {str(key): value for key, value in data.items()}
    includes = nested.pop(INCLUDE, [])
    if not (isinstance(includes, list) and all(isinstance(name, str) for name in includes)):
        raise UserError(f"{path}: {INCLUDE}: must be a list of file names, found {includes!r}")
    return Layer(path, nested, tuple(includes))


def compose(names: Sequence[str], default: str) -> list[Layer]:
    """Return the layers of configuration files, lowest first, above those of the ``default`` experiment."""
    return [layer for name in (default, *names) for layer in load_layers(find_config(name))]


def merge(layers: Sequence[Layer]) -> dict[str, Any]:
    """Merge layers into one nested dictionary: mappings key by key; of lists and values the last one wins."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer.data)
    return merged


def _merge(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)) or _changes_class(below, above):
        return above
    merged = dict(below)
    for key, value in above.items():
        merged[key] = _merge(below[key], value) if key in below else value
    return merged


def _changes_class(below: dict[str, Any], above: dict[str, Any]) -> bool:
    """Return whether ``above`` names another class, for which the arguments below mean nothing."""
    old, new = below.get("class_path"), above.get("class_path")
    return old is not None and new is not None and old.rpartition(".")[2] != new.rpartition(".")[2]


def walk(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all ``(dotted key, value)`` of a nested dictionary, branches before their leaves."""
    for key, value in data.items():
        dotted = f"{prefix}{key}"
        yield dotted, value
        if isinstance(value, dict):
            yield from walk(value, f"{dotted}.")


def source_of(key: str, layers: Sequence[Layer]) -> Path | None:
    """Return the file that gave ``key`` its value; `None` if no file has it."""
    for layer in reversed(layers):
        if any(dotted == key for dotted, _ in walk(layer.data)):
            return layer.path
    return None
