"""All configuration keys with their classes' arguments, and all flags of all commands, from the real parsers."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn
from unittest import mock

import jsonargparse

from lightning_moe.cli.main import COMMANDS, main
from lightning_moe.config.schema import Schema, class_types, subclasses
from lightning_moe.training.parse import build_parser

#: commands that take the keys of a configuration
CONFIGURED = ("fit", "validate", "test", "predict", "prepare", "plan")
PATH_KEYS = ("output_dir", "ckpt_path", "model.init_from", "data.tokenizer.file", "data.cache_dir")
PATH_FLAGS = frozenset(
    ["--ckpt_path", "--text", "--tokenizer", "--output", "--output_dir", "--config", "--prompt_file", "--page"]
)
#: keys and flags that say how many processes or threads there are
PROCESS_COUNTS = ("trainer.devices", "trainer.num_nodes", "data.num_workers", "--workers", "--num_gpus")


@dataclass(frozen=True)
class Key:
    """A key of a configuration.

    Args:
        name: dotted key.
        classes: class paths that it may have, each with the names of the arguments.
        in_list: whether its value is a list of such classes.
    """

    name: str
    classes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    in_list: bool = False


@cache
def keys() -> tuple[Key, ...]:
    found = []
    for name, typehint in Schema(build_parser("fit")).types.items():
        classes = {
            f"{cls.__module__}.{cls.__qualname__}": tuple(sorted(inspect.signature(cls).parameters))
            for base in class_types(typehint)
            for cls in subclasses(base)
            if cls.__module__.startswith(("lightning_moe.", "lightning.pytorch.")) and "Lazy" not in cls.__name__
        }
        in_list = name in ("trainer.callbacks", "trainer.plugins")
        found.append(Key(name, tuple(sorted(classes.items())), in_list))
    return tuple(found)


class Found(BaseException):
    """Ends a command when it has made its parser."""


@cache
def flags(command: str) -> tuple[tuple[str, bool], ...]:
    """Return the flags of a command that are no keys, each with whether it takes a value; "" is the argument."""

    def found(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
        raise Found(parser)

    if command in ("fit", "validate", "test", "predict"):
        return (("--config", True), ("--run_name", True), ("--output_dir", True), ("--ckpt_path", True))
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", found),
        mock.patch.object(jsonargparse.ArgumentParser, "parse_args", found),
    ):
        try:
            main([command])
        except Found as raised:
            parser = raised.args[0]
    names = [
        ((action.option_strings or [""])[-1], action.nargs != 0)
        for action in parser._actions
        if "." not in action.dest and action.dest not in ("help", "print_config")
    ]
    groups = {name.split(".")[0] for name in Schema(build_parser("fit")).groups}
    extra = [("--config", True)] if command == "plan" else []
    return tuple(sorted({*extra, *(n for n in names if n[0].removeprefix("--").split(".")[0] not in groups)}))


assert set(CONFIGURED) <= set(COMMANDS)
