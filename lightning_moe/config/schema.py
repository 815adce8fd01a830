"""The keys that the command-line parser takes, for messages and suggestions."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from difflib import SequenceMatcher
from enum import Enum
from importlib import import_module
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from lightning_moe.internals.jsonargparse import typed_arguments

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


class Schema:
    """The dotted keys of a parser with their types.

    Args:
        parser: parser whose arguments are all added.
    """

    def __init__(self, parser: ArgumentParser) -> None:
        self.types = typed_arguments(parser)
        self.groups = {key[:i] for key in self.types for i, char in enumerate(key) if char == "."}

    def owner(self, key: str) -> str | None:
        """Return the class-valued key that ``key`` lies in: ``model.routing`` for ``model.routing.init_args.x``."""
        parts = key.split(".")
        prefixes = [".".join(parts[:n]) for n in range(1, len(parts))]
        return next((prefix for prefix in prefixes if prefix in self.types and class_types(self.types[prefix])), None)

    def misplaced_value(self, data: Mapping[str, Any], prefix: str = "") -> tuple[str, Any] | None:
        """Return the first key with keys below it that has a plain value instead, with that value; or `None`."""
        for name, value in data.items():
            key = f"{prefix}{name}"
            if key in self.groups and key not in self.types:
                found = self.misplaced_value(value, f"{key}.") if isinstance(value, Mapping) else (key, value)
                if found:
                    return found
        return None

    def unknown_keys(self, data: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
        """Yield the dotted keys of a nested mapping that the parser does not take."""
        for name, value in data.items():
            key = f"{prefix}{name}"
            if key in self.groups:
                if isinstance(value, Mapping):
                    yield from self.unknown_keys(value, f"{key}.")
            elif key not in self.types:
                yield key
            elif isinstance(value, Mapping) and class_types(self.types[key]):
                yield from self._unknown_arguments(key, value)

    def _unknown_arguments(self, key: str, value: Mapping[str, Any]) -> Iterator[str]:
        yield from (f"{key}.{name}" for name in value if name not in CLASS_KEYS)
        arguments, class_path = value.get("init_args"), value.get("class_path")
        if isinstance(arguments, Mapping) and isinstance(class_path, str):
            known = parameters(find_class(class_path, self.types[key]))
            if known is not None:
                yield from (f"{key}.init_args.{name}" for name in arguments if name not in known)

    def unknown_flag(self, key: str, class_path: str | None) -> bool:
        """Return whether ``--key`` is surely no option; in a class-valued key, none of the class ``class_path``."""
        known_here = self.types.keys() | self.groups | {"print_config"}
        if key in known_here or key.removesuffix(".help") in self.types:
            return False
        owner = self.owner(key)
        if owner is None:
            return True
        name = key[len(owner) + 1 :].removeprefix("init_args.")
        known = parameters(find_class(class_path, self.types[owner])) if class_path else None
        return known is not None and name not in known and name not in CLASS_KEYS

    def nearest(self, key: str, class_path: str | None = None, as_flag: bool = False) -> str | None:
        """Return the known key most like ``key``, even if only its last part is right; `None` if none is near.

        Args:
            key: unknown key.
            class_path: class whose argument it would be; `None` for none.
            as_flag: whether to spell arguments of classes as on the command line, without ``init_args``.
        """
        candidates, middle = self.types.keys() | self.groups, "" if as_flag else "init_args."
        for owner, typehint in self.types.items():
            classes = [c for cls in class_types(typehint) if is_own(cls) for c in subclasses(cls)]
            if class_path and key.startswith(f"{owner}."):
                classes += [cls for cls in [find_class(class_path, typehint)] if cls is not None]
            candidates |= {f"{owner}.{middle}{name}" for cls in classes for name in parameters(cls) or ()}
        best = max(sorted(candidates), key=lambda candidate: _likeness(key, candidate), default=None)
        return best if best is not None and _likeness(key, best) > 0.6 else None


def _likeness(key: str, candidate: str) -> float:
    """Return 1 for equal keys; last parts count alone too: ``hidden_size`` finds ``model.decoder.hidden_size``."""
    whole = SequenceMatcher(None, key, candidate).ratio()
    leaf = SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
    return max(whole, 0.5 * whole + 0.5 * leaf)


def resolve_annotations(base: type) -> None:
    """Give the dataclasses under ``base`` real types in place of text (``from __future__ import annotations``).

    The parser looks a text up where the subclass is defined, finds no ``Literal`` that only the parent's module
    imports, and would then take any value for any argument of the class.
    """
    for cls in subclasses(base, abstract=True):
        if is_dataclass(cls):
            hints = get_type_hints(cls)
            cls.__init__.__annotations__.update({field.name: hints[field.name] for field in fields(cls)})


def is_own(cls: type) -> bool:
    """Return whether a class is this package's, with few enough subclasses to name all of them in a message."""
    return cls.__module__.startswith("lightning_moe.")


def class_types(typehint: Any) -> list[type]:
    """Return the classes in a type hint that are configured by ``class_path``."""
    if get_origin(typehint) in (Union, types.UnionType):
        return [cls for part in get_args(typehint) for cls in class_types(part)]
    plain = not isinstance(typehint, type) or typehint.__module__ == "builtins" or issubclass(typehint, Enum)
    return [] if plain else [typehint]


def subclasses(cls: type, abstract: bool = False) -> Iterator[type]:
    """Yield the class and everything imported that inherits from it; abstract ones only if asked for."""
    if abstract or not inspect.isabstract(cls):
        yield cls
    children: list[type] = cls.__subclasses__()
    for child in children:
        yield from subclasses(child, abstract)


def find_class(class_path: str, typehint: Any) -> type | None:
    """Return the class of a ``class_path``, which may be just the name of a known subclass; `None` for none."""
    module, _, name = class_path.rpartition(".")
    for base in class_types(typehint):
        for cls in subclasses(base):
            if cls.__name__ == name and (not module or cls.__module__.startswith(module)):
                return cls
    is_path = module and all(part.isidentifier() for part in class_path.split("."))
    try:
        found = getattr(import_module(module), name, None) if is_path else None
    except ImportError:
        return None
    return found if isinstance(found, type) else None


def moved_class(class_path: str, typehint: Any) -> str | None:
    """Return where the class of an old ``class_path`` of this package is now; `None` if it never had such a class."""
    module, _, name = class_path.rpartition(".")
    own = (cls for base in class_types(typehint) for cls in subclasses(base) if is_own(cls) and cls.__name__ == name)
    if not module.startswith("lightning_moe."):
        return None
    return next((f"{cls.__module__}.{name}" for cls in own), None)


def parameters(cls: type | None) -> set[str] | None:
    """Return the names of a class's arguments; `None` if they are not known (``**kwargs``)."""
    if cls is None:
        return None
    signature = inspect.signature(cls).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in signature):
        return None
    return {p.name for p in signature}


def describe(typehint: Any) -> str:
    """Return a type hint in the words of a configuration file: ``int or null``, ``one of relu2, swiglu``."""
    origin, arguments = get_origin(typehint), get_args(typehint)
    if typehint is None or typehint is type(None):
        return "null"
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(part) for part in arguments))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (list, tuple, set):
        return f"a list (of {describe(arguments[0])})" if arguments else "a list"
    if origin is dict or typehint is dict:
        return "a mapping"
    classes = class_types(typehint)
    if classes and is_own(classes[0]):
        return f"one of the classes {', '.join(sorted(cls.__name__ for cls in subclasses(classes[0])))}"
    names = {
        "str": "text",
        "bool": "true or false",
        "float": "a number",
        "int": "a whole number",
        "NonNegativeInt": "a whole number, 0 or more",
    }
    name = getattr(typehint, "__name__", str(typehint))
    return names.get(name, name)
