"""The LightningCLI behind ``fit``, ``validate``, ``test`` and ``predict``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from omegaconf.errors import OmegaConfBaseException

from lightning_moe import __version__
from lightning_moe.atomic import atomic_open
from lightning_moe.callbacks import FiniteGuard, LoadBalance, RoutingStateUpdate, ThresholdWarmup, Throughput
from lightning_moe.checkpoints.read import read_header
from lightning_moe.config.compose import merge
from lightning_moe.config.explain import check_layers, explain, user_error_behind
from lightning_moe.config.help import DESCRIPTION, usage
from lightning_moe.config.request import Request
from lightning_moe.config.schema import resolve_annotations
from lightning_moe.data import TextDataModule
from lightning_moe.errors import UserError
from lightning_moe.filenames import LAST_CHECKPOINT, SUMMARY_FILE
from lightning_moe.module import LanguageModel
from lightning_moe.processes import process_rank
from lightning_moe.routing import RoutingRule
from lightning_moe.runs import folder as rundir
from lightning_moe.tracking import LogLoadFigure, MLflowLogger, RewindMetrics, read_metrics
from lightning_moe.training.checkpoint import AtomicCheckpointIO, RunCheckpoint
from lightning_moe.training.layout import check_layout
from lightning_moe.training.memory import keep_freed_memory
from lightning_moe.training.progress import StepProgress
from lightning_moe.training.quiet import quiet
from lightning_moe.training.record import LastValidation, RecordEvaluation, RecordRun, log_at_last_step
from lightning_moe.training.summary import Summary, evaluation_text, summarize

CALLBACKS: dict[str, type[Callback]] = {
    "threshold_warmup": ThresholdWarmup,
    "load_balance": LoadBalance,
    "throughput": Throughput,
    "checkpoint": RunCheckpoint,
}
#: key → the key it follows from
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


class ExperimentCLI(LightningCLI):
    """Parses the configuration and builds model, data and trainer; `execute` runs the command.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        request: see `Request`.

    Raises:
        UserError: a key, value, file or checkpoint that does not fit.
    """

    def __init__(self, command: str, request: Request) -> None:
        quiet()
        self.command, self.request, self.validated = command, request, LastValidation()
        super().__init__(
            LanguageModel,
            TextDataModule,
            save_config_callback=None,
            parser_kwargs={
                "parser_mode": "omegaconf+",
                "exit_on_error": False,
                "prog": f"python -m lightning_moe {command}",
                "usage": usage(command),
                "description": f"{DESCRIPTION} Each flag below is also a key of a file.",
                "dump_header": [f"lightning_moe {__version__}"],
            },
            args=[f"--config={yaml.safe_dump(merge(request.layers), sort_keys=False)}", *request.flags],
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
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

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        resolve_annotations(RoutingRule)
        parser.add_lightning_class_args(LanguageModel, "model")
        parser.add_lightning_class_args(TextDataModule, "data")
        parser.add_class_arguments(
            Trainer, "trainer", fail_untyped=False, instantiate=False, sub_configs=True, skip=OWN_TRAINER_ARGUMENTS
        )
        parser.set_defaults({"trainer.num_sanity_val_steps": 0, "trainer.enable_model_summary": False})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.add_class_arguments(MLflowLogger, "tracking")
        for target, source in LINKS.items():
            parser.link_arguments(source, target)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        layers = self.request.layers
        check_layers(parser, layers, LINKS)
        try:
            self.config = parser.parse_args(args)
        except (argparse.ArgumentError, OmegaConfBaseException) as error:
            raise UserError(explain(error, parser, layers, self.request.flags)) from error

    def before_instantiate_classes(self) -> None:
        """Settle which folder the run has; every process of it gets the same answer."""
        if self.command != "fit" and self.request.ckpt_path is None:
            raise UserError(f"{self.command} needs --ckpt_path: a checkpoint's path, or last")
        self.run = rundir.announced() or self._settle_run()
        if process_rank() == 0:  # under torchrun or SLURM the others are nobody's children
            rundir.announce(self.run)
        self.config.run_name = self.run.name
        self.config.ckpt_path = None if self.run.ckpt_path is None else str(self.run.ckpt_path)

    def _settle_run(self) -> rundir.Run:
        config, path = self.config, self.request.ckpt_path
        if self.request.continues is not None:
            return rundir.Run(self.request.continues, path)
        if self.command != "fit" and path is not None:
            return rundir.Run(rundir.run_of_checkpoint(path) or path.parent, path)
        routing = config.model.routing
        name = config.run_name or rundir.generated_name(routing and routing.class_path, config.seed_everything)
        folder = Path(config.output_dir) / rundir.check_name(name)
        if process_rank() == 0:
            folder = rundir.claim(folder, may_number=config.run_name is None)
        return rundir.Run(folder, path)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            behind = user_error_behind(error)
            if behind is None:
                raise
            raise behind from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        try:
            trainer = super().instantiate_trainer(
                logger=False,  # `RecordRun` brings the run's own
                default_root_dir=str(self.run.folder),
                use_distributed_sampler=False,
                **kwargs,
            )
        except UserError:
            raise
        except (MisconfigurationException, ValueError) as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.run.checkpoints.absolute())
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        plugins = config["plugins"] or []
        config["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        callbacks = [FiniteGuard(), RoutingStateUpdate(), self.validated, *callbacks]
        given = config["callbacks"] or []
        if config["enable_progress_bar"] is not False and not any(isinstance(bar, ProgressBar) for bar in given):
            callbacks.append(StepProgress())
        if self.command == "fit" and not config["fast_dev_run"]:
            callbacks = [self._record(), RewindMetrics(), *callbacks, LogLoadFigure()]
        elif self.command in ("validate", "test") and os.access(self.run.folder, os.W_OK):
            callbacks = [self._record_evaluation(), *callbacks]
        return super()._instantiate_trainer(config, callbacks)

    def _record(self) -> RecordRun:
        config = self.config.clone()
        config.run_name = config.ckpt_path = None  # a repetition is another run
        text = self.parser.dump(config, skip_unset=False)
        return RecordRun(self.config_init.tracking, self.run.folder, text, self._tags())

    def _record_evaluation(self) -> RecordEvaluation:
        text = self.parser.dump(self.config, skip_unset=False)
        return RecordEvaluation(self.config_init.tracking, self.run.folder, self.command, text, self._tags())

    def _tags(self) -> dict[str, str]:
        routing, seed = self.config.model.routing, self.config.seed_everything
        return {"routing": rundir.routing_name(routing and routing.class_path), "seed": str(seed)}

    def execute(self) -> None:
        """Run the command on what was built."""
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        path = self.run.ckpt_path
        steps = self._check_checkpoints(path)
        options = {"datamodule": self.datamodule, "ckpt_path": path and str(path), "weights_only": True}
        if self.command == "fit":
            num_experts = self.model.decoder.config.num_experts if self.config.model.routing else 0
            if self.trainer.max_steps > 0:
                self.model.schedule_config.check(self.trainer.max_steps)
            check_layout(self.trainer, self.datamodule.global_batch_size, num_experts)
            with rundir.ends_with_first_process():
                self.trainer.fit(self.model, **options)
            self._finish()
        elif self.command == "predict":
            self._write(self.trainer.predict(self.model, **options) or [])
        else:
            log_at_last_step(self.trainer, steps)
            getattr(self.trainer, self.command)(self.model, verbose=False, **options)
            if self.trainer.is_global_zero:
                print(evaluation_text("val" if self.command == "validate" else "test", self.trainer.callback_metrics))

    def _check_checkpoints(self, ckpt_path: Path | None) -> int:
        """What does not fit is refused before the run's folder has anything in it. Returns the checkpoint's steps."""
        fitting, key, path = self.command == "fit", "ckpt_path", ckpt_path
        if fitting and ckpt_path is None and self.model.init_from is not None:
            key, path = "model.init_from", Path(self.model.init_from)
        if path is None:
            return 0
        try:
            header = read_header(path)
            self.model.check_architecture(path, header)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
        if fitting and key == "ckpt_path" and not header.get("optimizer_states", path.is_dir()):
            raise UserError(
                f"ckpt_path: {path}: has no optimizer state, so its training cannot go on; start from its weights with "
                f"--model.init_from={path}"
            )
        return int(header["global_step"])

    def _finish(self) -> None:
        """Validate the final model where training did not end with that, and report."""
        trainer, steps = self.trainer, self.trainer.global_step
        if trainer.interrupted or self.config.trainer.fast_dev_run:
            return
        if self.validated.step != steps:
            if _has_validation_of(steps, self.run.folder):  # a run that is continued behind its last step
                trainer.loggers = []
            log_at_last_step(trainer, steps)
            trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        logger = self.config_init.tracking if self.config.tracking.enabled else None
        last = self.run.checkpoints / LAST_CHECKPOINT
        summary = summarize(
            self.run,
            self.model,
            self.datamodule,
            trainer.callback_metrics,
            steps,
            self.config_init.throughput.tokens_per_second,
            logger,
            str(last) if last.exists() else None,
        )
        if trainer.is_global_zero:
            self._report(summary)

    def _write(self, predictions: Sequence[Any]) -> None:
        """Save what ``predict_step`` returned, one file per process: each tensor of all batches, stacked."""
        assert self.request.ckpt_path is not None
        rank = f"-rank-{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        path = self.run.folder / "predictions" / f"{self.request.ckpt_path.stem}{rank}.safetensors"
        tensors = {name: torch.cat([batch[name].cpu() for batch in predictions]) for name in predictions[0]}
        with atomic_open(path) as file:
            file.write(safetensors.torch.save(tensors))
        if self.trainer.is_global_zero:
            print(f"predictions: {path}")

    def _report(self, summary: Summary) -> None:
        path = self.run.folder / SUMMARY_FILE
        with atomic_open(path) as file:
            file.write(summary.to_json().encode())
        self.config_init.tracking.log_artifact(path)
        self.config_init.tracking.close()
        print(f"\n{summary.to_text()}")


def _has_validation_of(steps: int, folder: Path) -> bool:
    """Whether the record of a run has the validation after so many steps."""
    return any(line["step"] >= steps - 1 and "val/loss" in line for line in read_metrics(folder))
