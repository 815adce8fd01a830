"""Limits of texts and numbers that people type or that files hold. They say in words what would be right."""

from __future__ import annotations

import math

from lightning_moe.errors import UserError

#: whole numbers from low to high; numpy takes no other seeds
SEEDS = (0, 2**32 - 1)
#: what a C int takes: sizes, counts of steps and processes pass through one somewhere in torch
INTEGERS = (-(2**31), 2**31 - 1)
LONGEST_TEXT = 100_000  # characters; a path or name is far shorter, a chat template may be long
_LAYOUT = "\t\n\r"


def check_text(text: str, key: str) -> str:
    """Return a text if files, databases and terminals take it.

    Args:
        text: text that somebody typed, or that a file holds.
        key: key or option of the text, for the message.

    Raises:
        UserError: see `text_problem`.
    """
    problem = text_problem(text)
    if problem is not None:
        raise UserError(f"{key}={shown(text)}: {problem}")
    return text


def text_problem(text: str) -> str | None:
    """Say why a text is none that files, databases and terminals take, or return `None`.

    Such a text has a NUL byte, another control character, what is not UTF-8, or too many characters.
    """
    if len(text) > LONGEST_TEXT:
        return f"has {len(text):,} characters; {LONGEST_TEXT:,} is the most"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "is not UTF-8"
    controls = [c for c in text if (c < " " and c not in _LAYOUT) or "\x7f" <= c < "\xa0"]
    return f"has the control character {controls[0]!r}; leave it out" if controls else None


def number_problem(value: float, low: float = -math.inf, high: float = math.inf) -> str | None:
    """Say that a number is not finite, or not from ``low`` to ``high``; `None` if it is."""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if value < low:
        return f"must be at least {low:,}"
    return f"must be at most {high:,}" if value > high else None


def shown(value: object) -> str:
    """Return a value for a message, on one line and not too long."""
    if isinstance(value, int) and abs(value) > 10**100:
        return f"a whole number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:60]}…{text[-20:]}"
