"""The check of every value of a parsed configuration: null, range, and what a text may hold.

The parser checks types, but takes null for every key, and numbers and texts of any size. Ranges that need a second
key, and those of classes that also exist without a command line, are checked by the classes themselves.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Union, get_args, get_origin, get_type_hints

from jsonargparse import Namespace

from lightning_moe.bounds import INTEGERS, SEEDS, number_problem, shown, text_problem
from lightning_moe.config.schema import describe, find_class
from lightning_moe.errors import UserError

_COUNT = (0, INTEGERS[1])
_SIZE = (1, INTEGERS[1])
#: key → lowest and highest value. Where nothing is built yet that could be too large, the highest value keeps a
#: mistyped number from a run that never ends or from processes without number.
RANGES: dict[str, tuple[float, float]] = {
    "seed_everything": SEEDS,
    "data.seed": SEEDS,
    "data.num_workers": (0, 1_024),
    "data.sequence_length": (1, 2**24),
    "data.global_batch_size": (1, 2**24),
    "data.validation_batch_size": (1, 2**24),
    "data.tokenizer.vocab_size": (1, 2**24),
    "data.tokenizer.training_bytes": (1, 10**15),
    "model.decoder.num_layers": (1, 1_000),
    "model.decoder.num_experts": (1, 2**20),
    "model.decoder.num_shared_experts": (0, 2**20),
    "model.decoder.rope_theta": (1e-6, 1e30),
    "model.decoder.norm_eps": (0, 1),
    "trainer.num_nodes": (1, 100_000),
    "trainer.devices": (-1, 1_024),
    "trainer.max_epochs": (-1, INTEGERS[1]),
    "trainer.max_steps": (1, 10**9),
    "trainer.min_steps": _COUNT,
    "trainer.min_epochs": _COUNT,
    "trainer.fast_dev_run": (0, 10**9),
    "trainer.limit_train_batches": _COUNT,
    "trainer.limit_val_batches": _COUNT,
    "trainer.limit_test_batches": _COUNT,
    "trainer.limit_predict_batches": _COUNT,
    "trainer.overfit_batches": _COUNT,
    "trainer.val_check_interval": _COUNT,
    "trainer.check_val_every_n_epoch": _SIZE,
    "trainer.num_sanity_val_steps": (-1, INTEGERS[1]),
    "trainer.log_every_n_steps": _COUNT,
    "trainer.accumulate_grad_batches": (1, 2**24),
    "trainer.gradient_clip_val": (0, 1e30),
    "threshold_warmup.tokens": (0, 10**18),
    "threshold_warmup.steps": _COUNT,
    "threshold_warmup.min_steps": _COUNT,
    "threshold_warmup.tolerance": (0, 1e30),
    "checkpoint.every_n_train_steps": _COUNT,
    "tracking.flush_seconds": (0.01, 86_400),
    "tracking.finalize_seconds": (0, 86_400),
}
_TOKENS = (0, 10**18)  # of any other key with this unit


def check_values(types_of_keys: Mapping[str, Any], config: Namespace, where: Callable[[str], str]) -> None:
    """Refuse the first value of a configuration that no run can use.

    Args:
        types_of_keys: dotted key → type hint, see `schema.Schema`.
        config: parsed configuration.
        where: function that returns the file or flag of a key, for the message.

    Raises:
        UserError: naming key, value and file or flag, and what would be right.
    """
    for key, typehint in types_of_keys.items():
        if key in config:
            for wrong_key, value, problem in _problems(key, config[key], typehint):
                raise UserError(f"{wrong_key}={shown(value)} ({where(wrong_key)}): {problem}")


def is_nullable(typehint: Any) -> bool:
    """Return whether a type hint takes `None`."""
    if get_origin(typehint) in (Union, types.UnionType):
        return any(is_nullable(part) for part in get_args(typehint))
    return typehint in (None, type(None), Any, object)


def _problems(key: str, value: Any, typehint: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield key, value, and what would be right, of everything wrong in a value."""
    problem = None
    if value is None:
        problem = None if is_nullable(typehint) else f"must be {describe(typehint)}"
    elif isinstance(value, Namespace | Mapping):
        yield from _problems_inside(key, vars(value) if isinstance(value, Namespace) else value, typehint)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _problems(key, item, Any if item is None else typehint)
    elif isinstance(value, str):
        is_number = key in RANGES and re.fullmatch("-?[0-9]+", value) is not None
        problem = number_problem(int(value), *RANGES[key]) if is_number and len(value) < 100 else text_problem(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        problem = number_problem(value, *_range(key, value))
    if problem is not None:
        yield key, value, problem


def _problems_inside(key: str, items: Mapping[str, Any], typehint: Any) -> Iterator[tuple[str, Any, str]]:
    class_path = items.get("class_path")
    if not isinstance(class_path, str):
        for name, inner in items.items():
            if text_problem(str(name)):
                yield key, name, text_problem(str(name)) or ""
            yield from _problems(f"{key}.{name}", inner, Any)
        return
    hints: dict[str, Any] = {}
    with suppress(Exception):  # another package's class may have hints that cannot be evaluated
        hints = get_type_hints(find_class(class_path, typehint).__init__)  # type: ignore[misc]
    arguments = items.get("init_args") or {}
    for name, argument in (vars(arguments) if isinstance(arguments, Namespace) else arguments).items():
        yield from _problems(f"{key}.init_args.{name}", argument, hints.get(name, Any))


def _range(key: str, value: float) -> tuple[float, float]:
    found = RANGES.get(key)
    if found is not None:
        return found
    if key.endswith(("tokens", "bytes")):
        return _TOKENS
    return INTEGERS if isinstance(value, int) else (-1e30, 1e30)
