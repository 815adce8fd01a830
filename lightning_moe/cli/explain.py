"""Turns the parser's errors into one line: which key, from which file or flag, what was found, what would be right."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from lightning_moe.cli.compose import Layer, merge, source_of, walk
from lightning_moe.cli.schema import Schema, describe

FLAG = "the command line"


def explain(error: Exception, parser: ArgumentParser, layers: Sequence[Layer], flags: Sequence[str]) -> str:
    """The message for a user.

    Args:
        error: what the parser raised.
        parser: the parser, for its keys and types.
        layers: configuration files, lowest first.
        flags: command-line arguments without ``--config``.
    """
    schema = Schema(parser)
    given = dict(_flag_values(flags))
    return (
        _unknown_in_files(schema, layers)
        or _unknown_flag(schema, layers, given)
        or _wrong_value(schema, str(error), layers, given)
        or _linked(str(error), layers)
        or " ".join(str(error).split())
    )


def _unknown_in_files(schema: Schema, layers: Sequence[Layer]) -> str | None:
    for key in schema.unknown_keys(merge(layers)):
        return f"unknown key {key!r} in {source_of(key, layers)}{_suggestion(schema.nearest(key))}"
    return None


def _unknown_flag(schema: Schema, layers: Sequence[Layer], given: dict[str, str | None]) -> str | None:
    for key in given:
        owner = schema.owner(key)
        class_path = given.get(owner) or _class_path(layers, owner) if owner else None
        if schema.unknown_flag(key, class_path):
            near = schema.nearest(key, as_flag=True)
            return f"unknown option --{key} on {FLAG}{_suggestion(near and f'--{near}')}"
    return None


def _wrong_value(schema: Schema, message: str, layers: Sequence[Layer], given: dict[str, str | None]) -> str | None:
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    if not keys or keys[0] not in schema.types:
        return None
    key, typehint = keys[0], schema.types[keys[0]]
    expected = describe(typehint)
    if len(keys) > 1:  # an argument of a class: the message inside says what is wrong with it
        key = f"{key}.init_args.{keys[-1]}"
        inner = re.search(r"Expected an? (.+?)\.? Got value", message)
        expected = describe_parser_type(inner.group(1)) if inner else " ".join(message.split()[-12:])
    elif missing := re.search(r"arguments are required: ([\w., ]+)", message):
        file = source_of(key, layers)
        needed = ", ".join(f"{key}.init_args.{name.strip()}" for name in missing.group(1).split(","))
        return f"{needed}: missing{f' in {file}' if file else ''}; {class_name(layers, given, key)} needs it"
    value, where = _find_value(key, layers, given)
    return f"{key}={value!r} ({where}): must be {expected}"


def describe_parser_type(text: str) -> str:
    """The parser's ``<class 'float'>`` in our words."""
    plain = re.fullmatch(r"<class '(int|float|str|bool)'>", text)
    return describe({"int": int, "float": float, "str": str, "bool": bool}[plain.group(1)]) if plain else text


def class_name(layers: Sequence[Layer], given: dict[str, str | None], key: str) -> str:
    """Short name of the class chosen for a key."""
    return (given.get(key) or _class_path(layers, key) or key).rpartition(".")[2]


def _linked(message: str, layers: Sequence[Layer]) -> str | None:
    found = re.search(r'Linked "([\w.]+)" must be given via "([\w.]+)"', message)
    if not found:
        return None
    where = source_of(found.group(1), layers)
    return f"{found.group(1)} ({where or FLAG}) follows from {found.group(2)}: set that one"


def _find_value(key: str, layers: Sequence[Layer], given: dict[str, str | None]) -> tuple[Any, str]:
    for flag in (key, key.replace(".init_args.", ".")):
        if flag in given:
            return given[flag], FLAG
    where = source_of(key, layers)
    return dict(walk(merge(layers))).get(key), str(where) if where else "default"


def _class_path(layers: Sequence[Layer], key: str) -> str | None:
    value = dict(walk(merge(layers))).get(key)
    return value.get("class_path") if isinstance(value, dict) else value if isinstance(value, str) else None


def _flag_values(flags: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """``(key, value)`` of the ``--key=value`` and ``--key value`` arguments; null for a flag without a value."""
    for position, flag in enumerate(flags):
        if flag.startswith("--"):
            key, equals, value = flag[2:].partition("=")
            following = flags[position + 1 : position + 2]
            spaced = following[0] if following and not following[0].startswith("--") else None
            yield key.removesuffix("+"), value if equals else spaced


def _suggestion(near: str | None) -> str:
    return f": did you mean {near!r}?" if near else ": see --help for all keys"
