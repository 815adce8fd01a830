"""A trial's complete configuration, by the same parser as ``fit``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_moe.atomic import write_atomically
from lightning_moe.config.compose import Layer
from lightning_moe.config.request import Request
from lightning_moe.errors import UserError
from lightning_moe.sweep.space import Value
from lightning_moe.sweep.spec import Sweep
from lightning_moe.training.lightning_cli import ExperimentCLI


class _Parsed(ExperimentCLI):
    """Only parses: nothing is built, no folder is made."""

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass


def complete(layers: list[Layer], flags: Sequence[str] = ()) -> _Parsed:
    """Parse configuration layers, and flags above them.

    Raises:
        UserError: a key or value that does not fit, with the file that has it.
    """
    return _Parsed("fit", Request(layers, list(flags)))


def trial_layers(sweep: Sweep, values: dict[str, Value], seed: int) -> list[Layer]:
    """The layers of one run of a trial, lowest first."""
    path = sweep.path
    layers = [*sweep.base, *sweep.space.layers(values), Layer(path, {"seed_everything": seed})]
    if sweep.tokens_per_trial is not None:
        data: Any = complete(layers).config.data
        per_step = data.global_batch_size * data.sequence_length
        steps = sweep.tokens_per_trial // per_step
        if steps < 1:
            raise UserError(
                f"{path}: budget.tokens_per_trial={sweep.tokens_per_trial}: must be at least the {per_step} tokens of "
                "one step (data.global_batch_size × data.sequence_length)"
            )
        layers.append(Layer(path, {"trainer": {"max_steps": steps}}))
    return layers


def write_trial_config(sweep: Sweep, values: dict[str, Value], seed: int, path: Path) -> None:
    """Write the complete configuration of one run, which ``fit --config`` takes as it is."""
    parsed = complete(trial_layers(sweep, values, seed))
    parsed.config.run_name = parsed.config.ckpt_path = None
    write_atomically(path, parsed.parser.dump(parsed.config, skip_unset=False).encode())


def check_space(sweep: Sweep) -> None:
    """Parse both ends of every range and every choice once, before anything is trained.

    Raises:
        UserError: a key of the space that the configuration does not have, with the nearest one that it has, or a
            value that it does not take.
    """
    for point in sweep.space.corners():
        complete(trial_layers(sweep, point, sweep.seeds[0]))
