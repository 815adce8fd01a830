"""The instructions of a Dockerfile."""

import re
import shlex
from pathlib import Path


def instructions(path: Path) -> list[tuple[str, str]]:
    """``(FROM, "python:… AS …")`` and so on, continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]  # type: ignore[misc]


def last_stage(path: Path) -> list[tuple[str, str]]:
    """The instructions of the stage that becomes the image."""
    found = instructions(path)
    start = max(index for index, (name, _) in enumerate(found) if name == "FROM")
    return found[start:]


def environment(path: Path) -> dict[str, str]:
    """Variables that the image sets."""
    words = [word for name, rest in last_stage(path) if name == "ENV" for word in shlex.split(rest)]
    return dict(word.split("=", 1) for word in words)


def copied(path: Path) -> list[str]:
    """What is copied from the build's context."""
    copies = [rest.split() for name, rest in instructions(path) if name == "COPY" and not rest.startswith("--from")]
    return [source for *sources, _ in copies for source in sources]
