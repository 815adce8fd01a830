"""``--help`` of ``fit``, ``validate``, ``test`` and ``predict``: what can be said without torch and Lightning.

``--help all`` shows every option with type and meaning; for it the parser must import all classes first.
"""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

from lightning_moe.config.compose import Layer, conf_root, merge

DESCRIPTION = (
    "Files may be given several times: a path, or a name under conf/ such as routing/token_choice.\n"
    "They replace keys of experiment/quickstart, later files those of earlier ones, and flags those of all files."
)
OPTIONS = {
    "--help all": "every option with its type, default and meaning (takes seconds: imports Lightning)",
    "--model.routing.help NAME": "the options of one class, such as a routing rule",
    "--print_config": "the complete configuration that the given files and flags make",
}
RUN_OPTIONS = {
    "--run_name NAME": "name of the run's folder (default: made of routing, seed and time)",
    "--ckpt_path PATH": "a checkpoint, or last: that of run_name, or of the newest run",
}
WIDTH = 110


def usage(command: str) -> str:
    """Return the usage line of a command."""
    return f"python -m lightning_moe {command} [--config FILE] … [--key=value] …"


def help_wanted(flags: Sequence[str]) -> Literal["short", "all"] | None:
    """Return which help the flags ask for; `None` for none."""
    place = next((place for place, flag in enumerate(flags) if flag in ("-h", "--help")), None)
    if place is None:
        return None
    return "all" if flags[place + 1 : place + 2] == ["all"] else "short"


def short_help(command: str, layers: Sequence[Layer], more: Mapping[str, str]) -> str:
    """Return the usage, the files under ``conf/``, and a configuration as flags.

    Args:
        command: name of the command.
        layers: configuration files, lowest first.
        more: option → meaning, for options that not every command has.
    """
    rows = {**OPTIONS, **more}
    width = max(map(len, rows))
    options = "\n".join(f"  {name:<{width}}  {meaning}" for name, meaning in rows.items())
    files = "\n".join(_packaged())
    keys = "\n".join(f"  {flag}" for flag in flags_of(merge(layers)))
    return (
        f"usage: {usage(command)}\n\n{DESCRIPTION}\n\noptions:\n{options}\n\nfiles under conf/:\n{files}\n\n"
        f"what experiment/quickstart and the files given set, as flags:\n{keys}"
    )


def flags_of(data: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield a nested configuration as flags, quoted for a shell."""
    for name, value in data.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and "class_path" in value:
            yield f"--{key}={value['class_path']}"
            yield from flags_of(value.get("init_args") or {}, f"{key}.")
        elif isinstance(value, Mapping) and value:
            yield from flags_of(value, f"{key}.")
        else:
            yield f"--{key}={shlex.quote(value if isinstance(value, str) else json.dumps(value))}"


def _packaged() -> Iterator[str]:
    """Yield the names of the packaged configuration files, a paragraph for each folder."""
    paths = sorted(path.relative_to(conf_root()) for path in conf_root().rglob("*.yaml"))
    folders = [(folder.as_posix(), list(members)) for folder, members in groupby(paths, key=lambda path: path.parent)]
    width = max(len(folder) for folder, _ in folders) + 5
    for folder, members in folders:
        names = "  ".join(path.stem for path in members)
        yield textwrap.fill(names, WIDTH, initial_indent=f"  {folder}/".ljust(width), subsequent_indent=" " * width)
