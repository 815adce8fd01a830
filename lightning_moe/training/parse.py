"""Configuration files and flags, parsed and checked. Parsing makes no folder, sets no seed and prints nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import Namespace, set_dumper
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from omegaconf.errors import OmegaConfBaseException

from lightning_moe import __version__
from lightning_moe.callbacks import LoadBalance, ThresholdWarmup, Throughput
from lightning_moe.config.check import check_values
from lightning_moe.config.compose import Layer, merge
from lightning_moe.config.explain import check_layers, explain, place_of, wrapped_user_error
from lightning_moe.config.help import DESCRIPTION, usage
from lightning_moe.config.schema import Schema, resolve_annotations
from lightning_moe.config.yaml_text import dump_yaml
from lightning_moe.data import TextDataModule
from lightning_moe.errors import UserError
from lightning_moe.module import LanguageModel
from lightning_moe.routing import RoutingRule
from lightning_moe.tracking import MLflowLogger
from lightning_moe.training.checkpoint import RunCheckpoint
from lightning_moe.training.pretrained import complete, without_other_model

#: callbacks that have a key of their own, in the order in which the trainer calls them
CALLBACKS: dict[str, type[Callback]] = {
    "threshold_warmup": ThresholdWarmup,
    "load_balance": LoadBalance,
    "throughput": Throughput,
    "checkpoint": RunCheckpoint,
}
#: key → the key that it follows from
LINKS = {
    "model.decoder.vocab_size": "data.tokenizer.vocab_size",
    "model.decoder.max_sequence_length": "data.sequence_length",
}
#: Trainer arguments that the run's folder, the data module or the checkpoints decide
OWN_TRAINER_ARGUMENTS = {
    "logger",
    "default_root_dir",
    "enable_checkpointing",
    "use_distributed_sampler",
    "reload_dataloaders_every_n_epochs",
    "barebones",
    "model_registry",
    "sync_batchnorm",
}


@dataclass(frozen=True)
class Parsed:
    """A complete configuration.

    Args:
        config: every key with its value, with defaults.
        parser: parser that made it.
    """

    config: Namespace
    parser: LightningArgumentParser

    def to_yaml(self, **changes: Any) -> str:
        """Return the complete configuration as YAML, for ``fit --config``.

        Args:
            changes: other values for top-level keys.
        """
        config = self.config.clone()
        for key, value in changes.items():
            config[key] = value
        without_other_model(config)
        return str(self.parser.dump(config, skip_unset=False))

    def build(self) -> Namespace:
        """Build the objects of all keys: ``data``, ``model``, ``tracking`` and `CALLBACKS`, but not the trainer.

        Raises:
            UserError: values do not fit together.
        """
        try:
            built: Namespace = self.parser.instantiate(self.config)
        except (TypeError, ValueError) as error:
            cause = wrapped_user_error(error)
            if cause is None:  # of a class that is not ours
                raise UserError(f"the configuration cannot be built: {' '.join(str(error).split())}") from error
            raise cause from None
        return built


def parse(layers: Sequence[Layer], flags: Sequence[str] = (), parser: LightningArgumentParser | None = None) -> Parsed:
    """Parse configuration files, and flags above them.

    Args:
        layers: configuration files, lowest first.
        flags: command-line arguments without ``--config``.
        parser: parser, see `build_parser`; by default that of ``fit``.

    Raises:
        UserError: a key or value does not fit; the message names the file or flag that has it.
        SystemExit: code 0 after ``--help`` and ``--print_config``.
    """
    parser = parser or build_parser("fit")
    check_layers(parser, layers, LINKS)
    text = dump_yaml(merge(layers))
    try:
        config = parser.parse_args([f"--config={text}", *flags])
    except (argparse.ArgumentError, OmegaConfBaseException) as error:
        raise UserError(explain(error, parser, layers, flags)) from error
    own = {key: typehint for key, typehint in Schema(parser).types.items() if key not in LINKS}
    check_values(own, config, lambda key: place_of(key, layers, flags))
    complete(config, layers, flags)
    return Parsed(config, parser)


def build_parser(command: str) -> LightningArgumentParser:
    """Return the parser of a command with all keys of a run.

    Args:
        command: name of the command, for the usage line.
    """
    resolve_annotations(RoutingRule)
    set_dumper("yaml", dump_yaml)
    parser = LightningArgumentParser(
        parser_mode="omegaconf+",
        exit_on_error=False,
        prog=f"python -m lightning_moe {command}",
        usage=usage(command),
        description=f"{DESCRIPTION} Each flag below is also a key of a file.",
        dump_header=[f"lightning_moe {__version__}"],
    )
    parser.add_argument("-c", "--config", action="config", help="Path to a configuration file in json or yaml format.")
    parser.add_argument("--seed_everything", type=NonNegativeInt, default=1, help="Seed of every random generator.")
    parser.add_argument(
        "--run_name", type=str | None, default=None, help="Name of the run's folder; null: routing, seed and time."
    )
    parser.add_argument("--output_dir", type=str, default="runs", help="Folder of the runs' folders.")
    parser.add_argument(
        "--ckpt_path",
        type=str | None,
        default=None,
        help="Checkpoint to load, or 'last': that of run_name, or of the newest run under output_dir.",
    )
    parser.add_lightning_class_args(LanguageModel, "model")
    parser.add_lightning_class_args(TextDataModule, "data")
    parser.add_class_arguments(
        Trainer, "trainer", fail_untyped=False, instantiate=False, sub_configs=True, skip=OWN_TRAINER_ARGUMENTS
    )
    parser.set_defaults({"trainer.num_sanity_val_steps": 0, "trainer.enable_model_summary": False})
    for key, callback in CALLBACKS.items():
        parser.add_lightning_class_args(callback, key)
    parser.add_class_arguments(MLflowLogger, "tracking")
    for target, source in LINKS.items():
        parser.link_arguments(source, target)
    return parser
