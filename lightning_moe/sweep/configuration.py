"""A trial's complete configuration, by the same parser as ``fit``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lightning_moe.atomic import write_atomically
from lightning_moe.config.compose import Layer, merge
from lightning_moe.config.yaml_text import redacted_yaml
from lightning_moe.errors import UserError
from lightning_moe.sweep.space import Value
from lightning_moe.sweep.spec import Sweep
from lightning_moe.tracking.store import password_environment
from lightning_moe.training.parse import Parsed, parse
from lightning_moe.trust import config_fact, remember


def trial_layers(sweep: Sweep, values: dict[str, Value], seed: int) -> list[Layer]:
    """Return the layers of one run of a trial, lowest first."""
    path = sweep.path
    layers = [*sweep.base, *sweep.space.layers(values), Layer(path, {"seed_everything": seed})]
    if sweep.tokens_per_trial is not None:
        data: Any = parse(layers).config.data
        per_step = data.global_batch_size * data.sequence_length
        steps = sweep.tokens_per_trial // per_step
        if steps < 1:
            raise UserError(
                f"{path}: budget.tokens_per_trial={sweep.tokens_per_trial}: must be at least the {per_step} tokens of "
                "one step (data.global_batch_size × data.sequence_length)"
            )
        layers.append(Layer(path, {"trainer": {"max_steps": steps}}))
    return layers


def parse_trial(sweep: Sweep, values: dict[str, Value], seed: int) -> Parsed:
    """Parse the configuration of one run of a trial.

    Raises:
        UserError: a key or value that does not fit, with the file that has it.
    """
    return parse(trial_layers(sweep, values, seed))


def run_environment(base: Sequence[Layer]) -> dict[str, str]:
    """Return what the processes of runs need in their environment: the password of MLflow's store, if it has one.

    Args:
        base: configuration that the runs share.
    """
    tracking = OmegaConf.create(merge(base)).get("tracking")
    is_section = OmegaConf.is_dict(tracking)  # else the parser refuses it with a better message
    return password_environment(tracking.get("tracking_uri")) if is_section else {}


def write_trial_config(sweep: Sweep, values: dict[str, Value], seed: int, path: Path) -> None:
    """Write the complete configuration of one run, for ``fit --config``; passwords reach it by the environment."""
    text = redacted_yaml(parse_trial(sweep, values, seed).to_yaml(run_name=None, ckpt_path=None))
    write_atomically(path, text.encode())
    remember(config_fact(text))  # another's may name any code, see `PoolRun.has_own_config`


def check_space(sweep: Sweep) -> None:
    """Parse both ends of every range and every choice once, before anything is trained.

    Raises:
        UserError: a key of the space that is not in the configuration (the message names the nearest one), or a value
            that its key does not take.
    """
    for point in sweep.space.corners():
        parse_trial(sweep, point, sweep.seeds[0])
