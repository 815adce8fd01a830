"""The parser's errors as one line: which key, from which file or flag, what was found, what would be right."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from lightning_moe.bounds import shown, text_problem
from lightning_moe.config.compose import FLAG, Layer, merge, source_of, walk
from lightning_moe.config.schema import Schema, describe, find_class, moved_class
from lightning_moe.errors import UserError


def explain(error: Exception, parser: ArgumentParser, layers: Sequence[Layer], flags: Sequence[str]) -> str:
    """Return the message for a user.

    Args:
        error: error that the parser raised.
        parser: parser with the keys and types.
        layers: configuration files, lowest first.
        flags: command-line arguments without ``--config``.
    """
    schema = Schema(parser)
    given = dict(_flag_values(flags))
    return (
        _unknown_in_files(schema, layers)
        or _unknown_flag(schema, layers, given)
        or _wrong_value(schema, str(error), layers, given)
        or _linked(str(error))
        or _interpolation(schema, str(error), layers, given)
        or _circle(str(error), layers, flags)
        or " ".join(str(error).split())
    )


def place_of(key: str, layers: Sequence[Layer], flags: Sequence[str]) -> str:
    """Return the file that gave a key its value, ``the command line``, or ``default``."""
    given = dict(_flag_values(flags))
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        place = _find_value(".".join(parts[:length]), layers, given)[1]
        if place != "default":
            return place
    return "default"


def check_layers(parser: ArgumentParser, layers: Sequence[Layer], links: Mapping[str, str]) -> None:
    """Refuse what the parser would accept from a file and then ignore or misread.

    It would take a plain value in the place of a mapping for a file's name, and overwrite a key that follows from
    another one.

    Args:
        parser: parser with the keys.
        layers: configuration files, lowest first.
        links: key → the other key that it follows from.
    """
    found = Schema(parser).misplaced_value(merge(layers))
    if found is not None:
        raise UserError(f"{found[0]}={found[1]!r} ({source_of(found[0], layers)}): must be a mapping of keys to values")
    for key, value in walk(merge(layers)):
        # Here too, because YAML, through which the parser gets the files, cannot hold such a text.
        for text in (value if isinstance(value, list) else [value], key.split(".")):
            problem = next(filter(None, (text_problem(part) for part in text if isinstance(part, str))), None)
            if problem is not None:
                raise UserError(f"{shown(key)[1:-1]}={shown(value)} ({source_of(key, layers)}): {problem}")
        if key in links:
            raise UserError(f"{key}={value!r} ({source_of(key, layers)}): follows from {links[key]}; set that one")


def wrapped_user_error(error: BaseException | None) -> UserError | None:
    """Return the `UserError` that a library wrapped into its own; `None` if there is none."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _unknown_in_files(schema: Schema, layers: Sequence[Layer]) -> str | None:
    for key in schema.unknown_keys(merge(layers)):
        owner = schema.owner(key)
        near = schema.nearest(key, _class_path(layers, owner) if owner else None)
        return f"unknown key {key!r} in {source_of(key, layers)}{_suggestion(near)}"
    return None


def _unknown_flag(schema: Schema, layers: Sequence[Layer], given: dict[str, str | None]) -> str | None:
    for key in given:
        owner = schema.owner(key)
        class_path = given.get(owner) or _class_path(layers, owner) if owner else None
        if schema.unknown_flag(key, class_path):
            near = schema.nearest(key, class_path, as_flag=True)
            if owner and class_path and near == key:  # right for another class
                return f"--{key} is no option of {class_path.rpartition('.')[2]}, which {owner} is here"
            return f"unknown option --{key} on {FLAG}{_suggestion(near and f'--{near}')}"
    return None


def _wrong_value(schema: Schema, message: str, layers: Sequence[Layer], given: dict[str, str | None]) -> str | None:
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    if not keys or keys[0] not in schema.types:
        return None
    key, typehint = keys[0], schema.types[keys[0]]
    expected = describe(typehint)
    if len(keys) > 1:  # an argument of a class: the inner message says what is wrong with it
        cls = find_class(given.get(key) or _class_path(layers, key) or "", typehint)
        inner = re.search(r"Expected an? (.+?)\.? Got value", message)
        key = f"{key}.init_args.{keys[-1]}"
        parameter = None if cls is None else inspect.signature(cls).parameters.get(keys[-1])
        if parameter is not None and not isinstance(parameter.annotation, str):
            expected = describe(parameter.annotation)
        else:
            expected = describe_parser_type(inner.group(1)) if inner else " ".join(message.split()[-12:])
    elif missing := re.search(r"arguments are required: ([\w., ]+)", message):
        file = source_of(key, layers)
        needed = ", ".join(f"{key}.init_args.{name.strip()}" for name in missing.group(1).split(","))
        return f"{needed}: missing{f' in {file}' if file else ''}; {class_name(layers, given, key)} needs it"
    value, where = _find_value(key, layers, given)
    if isinstance(value, dict) and find_class(class_path := str(value.get("class_path")), typehint) is None:
        key, value = f"{key}.class_path", class_path
    if isinstance(value, str) and (moved := moved_class(value, typehint)) is not None:
        return f"{key}={value!r} ({where}): this class has moved; write {moved} there"
    return f"{key}={value!r} ({where}): must be {expected}"


def describe_parser_type(text: str) -> str:
    """Return the parser's ``<class 'float'>`` in our own words."""
    plain = re.fullmatch(r"<class '(int|float|str|bool)'>", text)
    return describe({"int": int, "float": float, "str": str, "bool": bool}[plain.group(1)]) if plain else text


def class_name(layers: Sequence[Layer], given: dict[str, str | None], key: str) -> str:
    """Return the short name of the class chosen for a key."""
    return (given.get(key) or _class_path(layers, key) or key).rpartition(".")[2]


def _interpolation(
    schema: Schema, message: str, layers: Sequence[Layer], given: Mapping[str, str | None]
) -> str | None:
    found = re.search(r"Interpolation key '\.*([\w.]+)' not found", message)
    if not found:
        return None
    key = found.group(1)
    places = [*given.items(), *walk(merge(layers))]
    users = (user for user, value in places if isinstance(value, str) and f"{key}}}" in value)
    user = next(users, None)
    return f"{f'{user}: ' if user else ''}interpolation ${{{key}}} finds no such key{_suggestion(schema.nearest(key))}"


def _circle(message: str, layers: Sequence[Layer], flags: Sequence[str]) -> str | None:
    found = re.search(r"Recursive interpolation detected\s+full_key: ([\w.]+)", message)
    if not found:
        return None
    return f"{found.group(1)} ({place_of(found.group(1), layers, flags)}): interpolations refer to it in a circle"


def _linked(message: str) -> str | None:
    found = re.search(r'Linked "([\w.]+)" must be given via "([\w.]+)"', message)
    return f"{found.group(1)} ({FLAG}): follows from {found.group(2)}; set that one" if found else None


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
    """Yield ``(key, value)`` of ``--key=value`` and ``--key value``; `None` for a flag without a value."""
    for position, flag in enumerate(flags):
        if flag.startswith("--"):
            key, equals, value = flag[2:].partition("=")
            following = flags[position + 1 : position + 2]
            spaced = following[0] if following and not following[0].startswith("--") else None
            yield key.removesuffix("+"), value if equals else spaced


def _suggestion(near: str | None) -> str:
    return f": did you mean {near!r}?" if near else ": see --help all for all keys"
