"""Text without the passwords and tokens of the URLs in it.

Everything that is written or printed passes through here: configurations, records, MLflow's tags, messages and logs.
"""

from __future__ import annotations

import re
from typing import Any, TextIO

HIDDEN = "***"

_SCHEME = r"(?P<scheme>[A-Za-z][\w.-]*(?:\+[\w.-]+)*)://"
_IN_TEXT = r"[^\s\"'`<>\x00]"  # a URL inside of a text ends at a blank or a quotation mark
_ANY = r"[^\n\x00]"  # where the whole text is a URL, its password may have these, too
_SECRET_NAME = (
    r"(?:[\w.%-]*(?:password|passwd|pwd|passphrase|secret|token|api[_-]?key|access[_-]?key|credential|signature)"
    r"[\w.%-]*|sig|auth|odbc_connect)"
)
# A query's value ends at &. Keywords of a connection string stand alone, or after a semicolon.
_QUERY = re.compile(rf"(?i)(?P<name>[?&]{_SECRET_NAME}=)[^\s&#\"'`<>\x00]+")
_KEYWORD = re.compile(r"(?i)(?P<name>(?:^|(?<=[\s;(\"']))(?:password|passwd|pwd)=)(?:'[^'\n]*'|[^\s;&\"')]+)")
_WEB = ("http", "https", "databricks")


def redact(text: str) -> str:
    """Return ``text`` with every password and token of a URL replaced by ``***``.

    A password may hold slashes, colons and at-signs: it ends at the last at-sign of its URL. It may also be a value of
    the query (``?password=…``), or a keyword of a connection string. A user's name without a password stays, except in
    the address of a web server, where it is a token.

    Args:
        text: any text, or one URL.
    """
    if "://" in text:
        whole = re.match(rf"{_SCHEME}[^\n]*\Z", text) is not None
        part = _ANY if whole else _IN_TEXT
        text = re.sub(rf"{_SCHEME}(?P<rest>{part}+)", _without_password, text)
    return _KEYWORD.sub(rf"\g<name>{HIDDEN}", _QUERY.sub(rf"\g<name>{HIDDEN}", text))


def redact_all(value: Any) -> Any:
    """Return plain data (mappings, lists, text, numbers) in which every text and key is redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact_all(key): redact_all(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact_all(inner) for inner in value]
    return value


class RedactedStream:
    """A text stream that writes what it gets without the passwords in it. Libraries write to it as to ``sys.stderr``.

    Args:
        stream: stream to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def is_redacted(text: str) -> bool:
    """Return whether ``redact`` has taken a password out of a URL."""
    return f"{HIDDEN}@" in text or f"={HIDDEN}" in text


def _without_password(found: re.Match[str]) -> str:
    scheme, rest = found["scheme"], found["rest"]
    is_web = scheme.partition("+")[0].lower() in _WEB
    nested = re.search(_SCHEME, rest) if is_web else None  # in a query; a database's password may look like this
    if nested is None:
        return _without_password_of(scheme, rest)
    return _without_password_of(scheme, rest[: nested.start()]) + redact(rest[nested.start() :])


def _without_password_of(scheme: str, rest: str) -> str:
    is_web = scheme.partition("+")[0].lower() in _WEB
    end = rest.rfind("@")
    port = r"(?::\d*)?" if is_web else ""  # SQLAlchemy takes what looks like a port for a password
    if end < 0 or re.match(rf"[^:/?#@]*{port}[/?#]", rest):  # the host is complete: the at-sign comes later
        return f"{scheme}://{rest}"
    user, colon, password = rest[:end].partition(":")
    if password:
        return f"{scheme}://{user}:{HIDDEN}{rest[end:]}"
    return f"{scheme}://{HIDDEN}{rest[end:]}" if is_web and user else f"{scheme}://{user}{colon}{rest[end:]}"
