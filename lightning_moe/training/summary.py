"""The summary of a run: its scores beside those of compressors, its load balance, a sample, and its files."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lightning_moe.config.settings import Segment
from lightning_moe.data import TextDataModule
from lightning_moe.metrics.catalogue import CATALOGUE, parse, shown_in
from lightning_moe.module import LanguageModel
from lightning_moe.report.tables import json_numbers, markdown_table, text_table
from lightning_moe.runs.folder import Run
from lightning_moe.tracking import MLflowLogger

SAMPLE_TOKENS = 96


@dataclass(frozen=True)
class Summary:
    """The result of a run.

    Args:
        run: name of the run.
        steps: number of optimizer steps.
        loss: validation loss, nats per token.
        perplexity: exponential of the loss.
        bits_per_byte: bits per byte of validation text; `None` if the text's bytes are unknown.
        domains: domain of the text → metrics of the catalogue's table ``domains``; empty for a text of one domain.
        compressors: bits per byte of ``gzip -9`` and ``xz -9`` on the same text; empty if the model was scored on a
            part of it only (``trainer.limit_val_batches``).
        layers: MoE layer → metrics of the catalogue's table ``layers`` in the validation; empty for a dense model.
        tokens_per_second: training throughput over all processes; `None` if no step was timed.
        total_parameters: number of all parameters.
        active_parameters: number of parameters that one token uses at the target rate.
        flops_per_token: FLOPs of one training token on active parameters, see `ModelSize` and `hf.healing`.
        train_tokens: number of training tokens, those before a continuation included.
        world_size: number of processes.
        micro_batch_size: windows that one process takes through the model together.
        segments: parts of the run that had other settings than the part before, see `config.settings.Segment`.
        data: description of the data, see `TextDataModule.describe`.
        sample: text that the model wrote.
        checkpoint: path of the last checkpoint; `None` if none was written.
        mlflow_command: command that shows MLflow's pages; `None` if a server already does.
        mlflow_url: address of the run's page; `None` if MLflow does not know the run.
    """

    run: str
    steps: int
    loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    domains: dict[str, dict[str, float]]
    compressors: dict[str, float]
    layers: dict[str, dict[str, float]]
    tokens_per_second: float | None
    total_parameters: int
    active_parameters: int
    flops_per_token: int
    train_tokens: int
    world_size: int
    micro_batch_size: int
    segments: list[dict[str, Any]]
    data: dict[str, str | int | float]
    sample: str
    checkpoint: str | None
    mlflow_command: str | None
    mlflow_url: str | None

    def to_json(self) -> str:
        """Return the content of ``summary.json``."""
        return json.dumps(json_numbers(asdict(self)), indent=2, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """Return the scores as a Markdown table, the description of the run's page in MLflow."""
        rows = _scores(vars(self))
        rows += [(f"{name}, same text", f"{value:.4f}") for name, value in self.compressors.items()]
        rows += _domain_rows(self.domains)
        return f"{self.steps} steps, {self.train_tokens:,} tokens\n\n{markdown_table([('metric', 'value'), *rows])}\n"

    def to_text(self) -> str:
        """Return the text that the command line prints."""
        rows = _scores(vars(self))
        rows += [(f"  {name}, same text", f"{value:.4f}") for name, value in self.compressors.items()]
        rows += _domain_rows(self.domains)
        speed = CATALOGUE["tokens_per_second"]
        rows.append((speed.title, speed.text(self.tokens_per_second)))
        rows.append(("parameters", f"{self.total_parameters:,} total, {self.active_parameters:,} active per token"))
        where = [("checkpoint", self.checkpoint or "none")]
        if self.mlflow_command:
            where.append(("open MLflow", self.mlflow_command))
        if self.mlflow_url:
            where.append(("this run", self.mlflow_url))
        parts = [
            f"Run {self.run}, {self.steps} steps",
            text_table(rows),
            _layer_table(self.layers),
            "Sample\n" + "\n".join(f"  | {line}" for line in printable(self.sample).splitlines()),
            text_table(where),
        ]
        return "\n\n".join(part for part in parts if part)


def evaluation_text(stage: str, metrics: Mapping[str, Any]) -> str:
    """Return what ``validate`` and ``test`` print.

    Args:
        stage: prefix of the metrics' names, ``val`` or ``test``.
        metrics: logged values by name.
    """
    values = {name: float(value) for name, value in metrics.items()}
    scores = {name.removeprefix(f"{stage}/"): value for name, value in values.items()}
    parts = [
        text_table(_scores(scores) + _domain_rows(domain_values(values, stage))),
        _layer_table(layer_values(values, f"{stage}_routing")),
    ]
    return "\n\n".join(part for part in parts if part)


def summarize(
    run: Run,
    model: LanguageModel,
    datamodule: TextDataModule,
    metrics: Mapping[str, Any],
    steps: int,
    segments: Sequence[Segment],
    tokens_per_second: float | None,
    logger: MLflowLogger | None,
    checkpoint: str | None,
) -> Summary:
    """Collect the result of a run, on every rank, since a sharded model generates on all of them.

    Args:
        run: run to summarize.
        model: trained model.
        datamodule: data of the validation, set up.
        metrics: logged values by name, with those of the last validation.
        steps: number of optimizer steps.
        segments: parts of the run with other settings.
        tokens_per_second: training throughput.
        logger: logger that knows MLflow's page; `None` without tracking.
        checkpoint: path of the last checkpoint.
    """
    values = {name: float(value) for name, value in metrics.items()}
    whole = model.trainer.limit_val_batches == 1.0
    return Summary(
        run=run.name,
        steps=steps,
        loss=values.get("val/loss"),
        perplexity=values.get("val/perplexity"),
        bits_per_byte=values.get("val/bits_per_byte"),
        domains=domain_values(values, "val"),
        compressors=compressor_bits_per_byte(datamodule.validation_text()) if whole else {},
        layers=layer_values(values, "val_routing"),
        tokens_per_second=tokens_per_second,
        total_parameters=model.size.total_parameters,
        active_parameters=model.size.active_parameters,
        flops_per_token=model.flops_per_token,
        train_tokens=datamodule.position * datamodule.sequence_length,
        world_size=model.trainer.world_size,
        micro_batch_size=datamodule.micro_batch_size,
        segments=[asdict(segment) for segment in segments],
        data=datamodule.describe(),
        sample=sample_text(model, datamodule),
        checkpoint=checkpoint,
        mlflow_command=logger.ui_command() if logger else None,
        mlflow_url=logger.run_url() if logger else None,
    )


def compressor_bits_per_byte(text: bytes) -> dict[str, float]:
    """Return the size of the text under ``gzip -9`` and ``xz -9`` in bits per byte; empty for an empty text."""
    if not text:
        return {}
    compressed = {"gzip -9": gzip.compress(text, 9), "xz -9": lzma.compress(text, preset=9)}
    return {name: 8 * len(data) / len(text) for name, data in compressed.items()}


def layer_values(metrics: Mapping[str, float], prefix: str) -> dict[str, dict[str, float]]:
    """Return ``{"layer_01": {"max_load": …}}`` from ``<prefix>/layer_01/max_load``; all layers are ``all``."""
    layers: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        found = parse(name)
        if found and found.group == prefix and "layers" in found.metric.tables:
            layers.setdefault(found.layer or "all", {})[found.metric.name] = value
    if len(layers) > 1:
        layers.pop("all", None)
    return dict(sorted(layers.items()))


def domain_values(metrics: Mapping[str, float], prefix: str) -> dict[str, dict[str, float]]:
    """Return ``{"code": {"domain_loss": …}}`` from ``<prefix>/domain_loss/code``."""
    domains: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        found = parse(name)
        if found and found.of and found.group == prefix and "domains" in found.metric.tables:
            domains.setdefault(found.of, {})[found.metric.name] = value
    return domains


def sample_text(model: LanguageModel, datamodule: TextDataModule) -> str:
    """Return a text that the model begins, the same for the same model."""
    start = torch.full((1, 1), datamodule.tokenizer.end_of_text_id)  # with which every document begins
    length = min(SAMPLE_TOKENS, model.decoder.max_sequence_length - 1)
    tokens = model.generate(start, length, temperature=0.8, top_k=50, seed=1)
    return str(datamodule.tokenizer.decode(tokens[0, 1:].tolist()))


def printable(text: str) -> str:
    """Return the text without control characters of a terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def _scores(values: Mapping[str, float | None]) -> list[tuple[str, str]]:
    return [(metric.title, metric.text(values.get(metric.name))) for metric in shown_in("scores")]


def _domain_rows(domains: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str]]:
    return [
        (f"{metric.title}, {domain}", metric.text(found[metric.name]))
        for metric in shown_in("domains")
        for domain, found in domains.items()
    ]


def _layer_table(layers: Mapping[str, Mapping[str, float]]) -> str:
    """Return the table of the layers; empty for a model without MoE layers."""
    if not layers:
        return ""
    metrics = shown_in("layers")
    rows = [["layer", *(metric.title for metric in metrics)]]
    rows += [[layer, *(metric.text(found.get(metric.name)) for metric in metrics)] for layer, found in layers.items()]
    return "Load per MoE layer\n" + text_table(rows, indent="  ")
