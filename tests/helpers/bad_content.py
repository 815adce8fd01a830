"""The content of a file with each of its keys deleted, or replaced by each of a list of wrong values."""

import copy
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lightning_moe.errors import UserError

#: values that no key of any file takes all of
WRONG: dict[str, Any] = {
    "null": None,
    "-1": -1,
    "2**63": 2**63,
    "1e400": math.inf,
    "nan": math.nan,
    "text": "text",
    "empty text": "",
    "[]": [],
    "{}": {},
    "true": True,
    "nested lists": [[[[1]]]],
}
#: gives a test ``every``: one wrong value for each key, or in the slow tests every wrong value for each key
EVERY = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
SECONDS = 60  # for one reading, which takes milliseconds
_DELETED = object()


def wrong_contents(content: Any, alike: int = 1) -> Iterator[tuple[str, Any]]:
    """Yield (what is wrong, content), where one key is wrong.

    Args:
        content: nested dicts and lists, as the file should have them.
        alike: number of entries of a list, or of a mapping whose entries are alike, that are changed.
    """
    for path in _paths(content, (), alike):
        for name, value in {**WRONG, "deleted": _DELETED}.items():
            if path or value is not _DELETED:
                yield f"{'.'.join(map(str, path)) or 'content'}: {name}", _changed(content, path, value)


def one_each(contents: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield one wrong content for each key, each time with another kind of value."""
    by_key: dict[str, list[tuple[str, Any]]] = {}
    for wrong, content in contents:
        by_key.setdefault(wrong.rpartition(": ")[0], []).append((wrong, content))
    for number, choices in enumerate(by_key.values()):
        yield choices[number * 5 % len(choices)]


def _paths(node: Any, path: tuple[Any, ...], alike: int) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(node, dict):
        shapes = [set(inner) if isinstance(inner, dict) else type(inner) for inner in node.values()]
        many = len(node) > 3 and all(shape == shapes[0] for shape in shapes) and isinstance(shapes[0], set)
        for key in list(node)[: alike if many else None]:
            yield from _paths(node[key], (*path, key), alike)
    elif isinstance(node, list | tuple):
        for index in range(min(alike, len(node))):
            yield from _paths(node[index], (*path, index), alike)


def _changed(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Copy the nodes on the path, and only these."""
    if not path:
        return copy.deepcopy(value)
    new: Any = dict(node) if isinstance(node, dict) else list(node)
    if len(path) == 1 and value is _DELETED:
        del new[path[0]]
    else:
        new[path[0]] = _changed(node[path[0]], path[1:], value)
    return new


def surprises(contents: Iterator[tuple[str, Any]], read: Callable[[Any], object], named: str) -> list[str]:
    """Return a line for each content that is neither taken nor refused in one line that names the file.

    Args:
        contents: what `wrong_contents` yields.
        read: function that writes the content to its file and reads it as the program does.
        named: text that each refusal has.
    """
    found = []
    for wrong, content in contents:
        try:
            with no_longer_than(SECONDS):
                read(content)
        except UserError as error:
            if named not in str(error) or "\n" in str(error):
                found.append(f"{wrong}: said: {error}")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of a library in Rust is no Exception
            found.append(f"{wrong}: {type(error).__name__}: {error}".replace("\n", " ")[:300])
    return found


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """Raise TimeoutError if the block takes longer."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
