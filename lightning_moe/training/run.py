"""`fit`, `evaluate` (the commands ``validate`` and ``test``) and `predict`, each from its request to its result."""

from __future__ import annotations

import os
from typing import Any

import safetensors.torch
import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.utilities import rank_zero_info

from lightning_moe.atomic import atomic_open, check_writable
from lightning_moe.callbacks import FiniteGuard, RoutingStateUpdate
from lightning_moe.config.request import Request
from lightning_moe.config.yaml_text import redacted_yaml
from lightning_moe.errors import UserError
from lightning_moe.file_schema import refuse_special
from lightning_moe.filenames import LAST_CHECKPOINT, SUMMARY_FILE
from lightning_moe.runs import folder as rundir
from lightning_moe.tracking import LogLoadFigure, RewindMetrics
from lightning_moe.tracking.files import NOTE_TAG, check_record
from lightning_moe.training import continuing
from lightning_moe.training.gpu_memory import check_gpu_memory, memory_explained
from lightning_moe.training.layout import check_layout
from lightning_moe.training.parse import CALLBACKS, Parsed, build_parser, parse
from lightning_moe.training.pretrained import check_trainer, use_tokenizer
from lightning_moe.training.quiet import quiet
from lightning_moe.training.record import (
    LastValidation,
    RecordEvaluation,
    RecordRun,
    has_validation_of,
    log_at_last_step,
)
from lightning_moe.training.summary import evaluation_text, summarize
from lightning_moe.training.trainer import (
    build_trainer,
    check_initial_weights,
    misconfiguration_refused,
    open_checkpoint,
)


def fit(request: Request) -> None:
    """Train a model from scratch or from a checkpoint, score it, and write the summary of the run.

    Raises:
        UserError: bad configuration, checkpoint or data; the run's folder is then empty.
        RunEnded: training ended before its last step; see `errors`.
    """
    parsed, run, built = _prepare("fit", request)
    model, data, tracking = built.model, built.data, built.tracking

    # start of the run
    start = open_checkpoint(run.ckpt_path, model, training=True)
    continuing.check(start.trained, _own_config(parsed))
    check_record(run.folder)
    refuse_special(run.folder / SUMMARY_FILE)  # it is written at the end, which is late for a refusal
    start.prepare(data, _own_config(parsed))
    initial = check_initial_weights(model) if run.ckpt_path is None else None

    # trainer and callbacks
    recorded = not parsed.config.trainer.fast_dev_run
    last_validation = LastValidation()
    callbacks = [FiniteGuard(), RoutingStateUpdate(), last_validation, *_configured_callbacks(built)]
    record = RecordRun(tracking, run.folder, _own_config(parsed), _tags(parsed), start.trained, initial)
    recording: list[Callback] = []
    if recorded:
        recording, callbacks = [record, RewindMetrics()], [*callbacks, LogLoadFigure()]
    trainer = build_trainer(built.trainer, run, recording, callbacks, start.checkpoint_io)

    # checks, before any other process starts
    if trainer.max_steps > 0 and recorded:
        model.schedule_config.check(trainer.max_steps)
    check_layout(trainer, data.global_batch_size, model.decoder.num_experts if model.hparams["routing"] else 0)

    check_trainer(trainer, model)
    check_gpu_memory(trainer, model, data.global_batch_size)

    explained = memory_explained(trainer, model, data.global_batch_size)
    with rundir.ends_with_first_process(), misconfiguration_refused(), explained:
        trainer.fit(model, datamodule=data, ckpt_path=_text(run.ckpt_path), weights_only=True)
    if trainer.interrupted or not recorded:
        return

    # final validation, unless training ended with one
    steps = trainer.global_step
    if last_validation.step != steps:
        if has_validation_of(steps, run.folder):  # recorded before the run was continued
            trainer.loggers = []
        log_at_last_step(trainer, steps)
        trainer.validate(model, datamodule=data, verbose=False)

    summary = summarize(
        run,
        model,
        data,
        trainer.callback_metrics,
        steps,
        record.segments,
        built.throughput.tokens_per_second,
        tracking if parsed.config.tracking.enabled else None,
        str(last) if (last := run.checkpoints / LAST_CHECKPOINT).exists() else None,
    )
    if trainer.is_global_zero:
        with atomic_open(run.folder / SUMMARY_FILE) as file:
            file.write(summary.to_json().encode())
        tracking.log_artifact(run.folder / SUMMARY_FILE)
        tracking.log_tags({NOTE_TAG: summary.to_markdown()})
        tracking.close()
        print(f"\n{summary.to_text()}")


def evaluate(command: str, request: Request) -> None:
    """Score a checkpoint on the validation text, and record it in the folder of the run that wrote it.

    Args:
        command: command ``validate`` or ``test``, Lightning's two words for the same here.
        request: request of the command line.

    Raises:
        UserError: bad configuration, checkpoint or data.
    """
    parsed, run, built = _prepare(command, request)
    start = open_checkpoint(run.ckpt_path, built.model, training=False)
    start.prepare(built.data, _own_config(parsed))
    callbacks = [FiniteGuard(), RoutingStateUpdate(), *_configured_callbacks(built)]
    recording: list[Callback] = []
    if os.access(run.folder, os.W_OK):
        text = parsed.to_yaml(run_name=run.name, ckpt_path=_text(run.ckpt_path))
        recording = [RecordEvaluation(built.tracking, run.folder, command, text, _tags(parsed))]
    else:
        rank_zero_info(f"{run.folder} is for reading only: this evaluation is not recorded")
    trainer = build_trainer(built.trainer, run, recording, callbacks, start.checkpoint_io)
    log_at_last_step(trainer, start.steps)
    score = trainer.validate if command == "validate" else trainer.test
    with misconfiguration_refused():
        score(built.model, datamodule=built.data, ckpt_path=_text(run.ckpt_path), weights_only=True, verbose=False)
    if trainer.is_global_zero:
        scores = evaluation_text("val" if command == "validate" else "test", trainer.callback_metrics)
        if recording:
            built.tracking.log_tags({NOTE_TAG: f"```\n{scores}\n```\n"})
            built.tracking.close()
        print(scores)


def predict(request: Request) -> None:
    """Run a checkpoint over the prediction text, and write what `LanguageModel.predict_step` returns.

    Each process writes a file ``predictions/<checkpoint>.safetensors``: the tensors of all its batches, stacked.

    Raises:
        UserError: bad configuration, checkpoint or data.
    """
    parsed, run, built = _prepare("predict", request)
    folder = run.folder / "predictions"
    try:
        check_writable(folder)
    except OSError as error:
        raise UserError(
            f"predict writes to {folder}, which cannot be written: {error.strerror}; copy the run's folder to another "
            "place and give the checkpoint in it"
        ) from None
    start = open_checkpoint(run.ckpt_path, built.model, training=False)
    start.prepare(built.data, _own_config(parsed))
    callbacks = [FiniteGuard(), RoutingStateUpdate(), *_configured_callbacks(built)]
    trainer = build_trainer(built.trainer, run, [], callbacks, start.checkpoint_io)
    with misconfiguration_refused():
        batches: Any = trainer.predict(
            built.model, datamodule=built.data, ckpt_path=_text(run.ckpt_path), weights_only=True
        )
    rank = f"-rank-{trainer.global_rank}" if trainer.world_size > 1 else ""
    assert run.ckpt_path is not None
    path = folder / f"{run.ckpt_path.stem}{rank}.safetensors"
    tensors = {name: torch.cat([batch[name].cpu() for batch in batches]) for name in batches[0]}
    with atomic_open(path) as file:
        file.write(safetensors.torch.save(tensors))
    if trainer.is_global_zero:
        print(f"predictions: {path}")


def _prepare(command: str, request: Request) -> tuple[Parsed, rundir.Run, Namespace]:
    """Parse, find the run's folder, set the seed, and build data, model and callbacks."""
    quiet()
    parsed = parse(request.layers, request.flags, build_parser(command))
    if command != "fit" and request.ckpt_path is None:
        raise UserError(f"{command} needs --ckpt_path: a checkpoint's path, or last")
    run = rundir.settle(request, **_tags(parsed), config=_own_config(parsed))
    seed_everything(parsed.config.seed_everything, workers=True)
    built = parsed.build()
    use_tokenizer(built.data, built.model)
    return parsed, run, built


def _configured_callbacks(built: Namespace) -> list[Callback]:
    return [built[key] for key in CALLBACKS]


def _own_config(parsed: Parsed) -> str:
    """Return the content of the run's ``config.yaml``. It names no run, because a repetition is another run."""
    return redacted_yaml(parsed.to_yaml(run_name=None, ckpt_path=None))


def _tags(parsed: Parsed) -> dict[str, str]:
    """Return the tags that distinguish runs: the routing rule's short name, and the seed."""
    routing = parsed.config.model.routing
    return {
        "routing": rundir.routing_name(routing and routing.class_path),
        "seed": str(parsed.config.seed_everything),
    }


def _text(path: os.PathLike[str] | None) -> str | None:
    return None if path is None else str(path)
