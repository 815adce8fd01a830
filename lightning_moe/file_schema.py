"""Read files that may hold anything: regular files of a sane size, whose content is checked against a schema.

A schema is a type: a dataclass or a `TypedDict`, with bounds as ``Annotated[int, Ge(0)]``. It stands beside the code
that writes the file. pydantic compares the content with it, strictly: ``"3"`` and ``true`` are no numbers. It is
imported at the first use, so that ``--help`` stays fast.
"""

from __future__ import annotations

import os
import reprlib
import stat
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lightning_moe.errors import UserError

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

LARGEST = 2**28  # bytes of a file that is read as a whole, such as JSON; the largest real ones have some 10 MB
T = TypeVar("T")

_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}
#: words of pydantic → our words
_WORDS = {
    "Input should be ": "",
    "a valid integer": "a whole number",
    "a valid dictionary": "a mapping",
    "an object": "a mapping",
    "a valid string": "text",
    "a valid number": "a number",
    "a valid list": "a list",
    "a valid array": "a list",
    "a valid tuple": "a list",
    "a valid boolean": "true or false",
    "an instance of Tensor": "a tensor",
    "None": "null",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "above",
    "less than": "below",
}
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 60, 60


def refuse_special(path: Path, name: str | None = None) -> None:
    """Refuse a folder, device, pipe or socket where a file is expected. Reading some of them would never end.

    Args:
        path: path of the file. A missing one is not refused here.
        name: name of the file in the message, such as ``--text FILE``; by default the path.

    Raises:
        UserError: it is there, and no regular file.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # missing, or no path at all, which opening it says better
        return
    if not stat.S_ISREG(mode):
        kind = next((word for test, word in _KINDS.items() if test(mode)), "something else")
        raise UserError(f"{name or path}: is {kind}; must be a regular file")


def read_bytes(path: Path, name: str | None = None, largest: int = LARGEST) -> bytes:
    """Return the content of a file.

    Args:
        path: path of the file.
        name: name of the file in messages; by default the path.
        largest: largest size that is read, in bytes.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is no regular file, too large, or cannot be read.
    """
    refuse_special(path, name)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > largest:
                raise UserError(f"{name or path}: has {size} bytes; must have at most {largest}")
            return file.read(size)
    except (FileNotFoundError, UserError):
        raise
    except (OSError, ValueError) as error:  # the latter: a path with a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{name or path}: cannot be read: {reason}") from None


def read_text(path: Path, name: str | None = None, largest: int = LARGEST) -> str:
    """Return the content of a file in UTF-8, as `read_bytes` does, with line ends as ``\\n``.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is no regular file, too large, cannot be read, or is not UTF-8.
    """
    content = read_bytes(path, name, largest)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is 0x{content[error.start]:02x}"
        raise UserError(f"{name or path}: is not UTF-8 text: {found}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, schema: type[T]) -> T:
    """Return the content of a JSON file, as an object of its schema.

    Keys that the schema does not have are left out.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, or has another content than the schema says.
    """
    content = read_bytes(path)
    return parse_json(content, schema, str(path))


def parse_json(content: bytes | str, schema: type[T], where: str) -> T:
    """Return JSON as an object of its schema, as `read_json` does.

    Args:
        content: text of the JSON.
        schema: type of the result.
        where: file of the content, for the message.

    Raises:
        UserError: the content is another one than the schema says.
    """
    from pydantic import ValidationError

    try:
        result: T = _adapter(cast(Any, schema)).validate_json(content, strict=True)
    except ValidationError as error:
        raise _refusal(error, where) from None
    return result


def check(content: Any, schema: Any, where: str) -> None:
    """Compare Python objects with a schema.

    Args:
        content: nested dicts and lists.
        schema: type that they should have; a `TypedDict` may have further keys.
        where: file of the content, for the message.

    Raises:
        UserError: the content is another one than the schema says.
    """
    from pydantic import ValidationError

    try:
        _adapter(schema).validate_python(content, strict=True)
    except ValidationError as error:
        raise _refusal(error, where) from None


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def _refusal(error: ValidationError, where: str) -> UserError:
    """Return our one line for the first key that is wrong."""
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    if first["type"] == "json_invalid":
        return UserError(f"{where}: is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    key = _key(first["loc"])
    if first["type"] == "missing":
        return UserError(f"{where}: {key}: is missing")
    alike = dict.fromkeys(_in_our_words(one["msg"]) for one in problems if _key(one["loc"]) == key)
    found = f"{key}={short(first['input'])}" if key else f"holds {short(first['input'])}"
    return UserError(f"{where}: {found}: must be {' or '.join(alike)}")


def _key(loc: tuple[int | str, ...]) -> str:
    """Return the dotted key of a place, without what pydantic adds for the members of a union."""
    return ".".join(_parts(loc))


def _parts(loc: tuple[int | str, ...]) -> Iterator[str]:
    for part in loc:
        text = str(part)
        if text not in _MEMBERS and not text.startswith(("literal[", "function-", "constrained-", "dict[", "list[")):
            yield text


_MEMBERS = {"float", "int", "str", "bool", "none", "nullable", "[key]"}


def _in_our_words(message: str) -> str:
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    return message


def short(value: Any) -> str:
    """Return a value for a message, shortened."""
    return "null" if value is None else " ".join(_SHORT.repr(value).split())
