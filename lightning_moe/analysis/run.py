"""From checkpoints and text to the sections of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_moe.analysis import (
    agreement,
    compute,
    fanout,
    intensity,
    load,
    pools,
    router_logits,
    specialization,
    training_record,
    usage,
)
from lightning_moe.analysis.collect import Collected, Subject
from lightning_moe.analysis.section import Row, Section
from lightning_moe.analysis.training_record import TrainingRecord
from lightning_moe.data import Tokenizer
from lightning_moe.errors import UserError
from lightning_moe.filenames import METRICS_FILE
from lightning_moe.routing import Phase
from lightning_moe.runs.config import read_config

RELEASED = -1  # in place of the step, for a model that was not trained here


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from.

    Args:
        path: path of the checkpoint.
        rule: class name of its routing rule, or ``dense``.
        step: number of optimizer steps before it; `RELEASED` for a released model.
        run_dir: folder of its run; `None` outside of one.
        checkpoint: content without weights and optimizer state.
    """

    path: Path
    rule: str
    step: int
    run_dir: Path | None
    checkpoint: Mapping[str, Any]


def check_comparable(subjects: Sequence[Subject]) -> None:
    """Refuse checkpoints whose experts cannot be set side by side.

    Raises:
        UserError: they differ in MoE layers or experts.
    """
    routed = [subject for subject in subjects if subject.layers]
    for subject in routed[1:]:
        shapes = [(len(s.layers), s.num_experts) for s in (routed[0], subject)]
        if shapes[0] != shapes[1] or routed[0].layers != subject.layers:
            raise UserError(
                f"{routed[0].label} has {shapes[0][0]} MoE layers of {shapes[0][1]} experts, {subject.label} "
                f"{shapes[1][0]} of {shapes[1][1]}: they cannot be compared expert by expert; analyse each by itself."
            )


def sections(
    subjects: Sequence[Subject],
    origins: Mapping[str, Origin],
    collected: Collected,
    domains: Sequence[str],
    tokenizer: Tokenizer,
    sequence_length: int,
) -> list[Section]:
    """Return all diagnostics.

    Args:
        subjects: checkpoints to analyse.
        origins: label → origin of the checkpoint.
        collected: measurements of the pass over the text.
        domains: names of the domains.
        tokenizer: tokenizer of all checkpoints.
        sequence_length: number of tokens of the analysed windows.
    """
    routed = [subject for subject in subjects if subject.layers]
    parts: list[Section] = []
    if routed:
        measured = {s.label: collected.measurements[s.label] for s in routed}
        layers, rates = routed[0].layers, {s.label: s.rates for s in routed}
        labels = [s.label for s in routed]
        parts = [
            intensity.section(
                {label: m.intensity for label, m in measured.items()},
                domains,
                layers,
                {s.label: s.target * len(layers) for s in routed},
                tokenizer,
            ),
            fanout.section(
                {label: m.fanout for label, m in measured.items()}, layers, {s.label: s.target for s in routed}
            ),
            load.section({label: load.Load.of(m.specialization, m.usage) for label, m in measured.items()}, layers),
            specialization.section({label: m.specialization for label, m in measured.items()}, domains, layers, rates),
            usage.section({label: m.usage for label, m in measured.items()}, layers),
            router_logits.section({label: m.router_logits for label, m in measured.items()}, layers, rates),
            agreement.section(collected.pairs, labels, layers),
        ]
    parts.append(compute.section({label: m.compute for label, m in collected.measurements.items()}))
    if any(m.pools is not None for m in collected.measurements.values()):
        parts.append(_pools(subjects, origins, collected, sequence_length))
    if all(origin.step == RELEASED for origin in origins.values()):
        return parts  # their training is nowhere on record
    return parts + _of_training(subjects, origins, collected)


def _pools(
    subjects: Sequence[Subject], origins: Mapping[str, Origin], collected: Collected, sequence_length: int
) -> Section:
    trained = {}
    for subject in subjects:
        mine, rule, run_dir = collected.measurements[subject.label], subject.rule, origins[subject.label].run_dir
        config = None if run_dir is None else read_config(run_dir)
        pool = pools.training_pool(rule, subject.decoder.max_sequence_length, config)
        # a whole batch is another pool here than it was in training
        same = rule is None or rule.pool_in(Phase.TRAIN) not in ("micro_batch", "global")
        causal = mine.training_routing.causal_loss  # on the same batches as the rings
        as_trained = mine.training_routing.loss if same else None
        trained[subject.label] = pools.Trained(rule, pool, mine.losses.mean if causal is None else causal, as_trained)
    sweeps = {label: m.pools for label, m in collected.measurements.items() if m.pools is not None}
    return pools.section(sweeps, trained, sequence_length)


def run_names(origins: Mapping[str, Origin]) -> dict[str, str]:
    """Return label → the checkpoint's run in figures: its name, or the whole path if two runs share that name."""
    folders = {label: origin.run_dir.resolve() for label, origin in origins.items() if origin.run_dir is not None}
    distinct = [folder.name for folder in set(folders.values())]
    return {label: f.name if distinct.count(f.name) == 1 else str(f) for label, f in folders.items()}


def _of_training(subjects: Sequence[Subject], origins: Mapping[str, Origin], collected: Collected) -> list[Section]:
    records: dict[str, TrainingRecord] = {}
    missing: list[str] = []
    names = run_names(origins)
    for subject in subjects:
        origin = origins[subject.label]
        if origin.run_dir is None:
            missing.append(
                f"{subject.label}: {origin.path} is not in a run's folder, so its training is not on record."
            )
            continue
        target = [rate * subject.num_experts for rate in subject.rates]
        warms_up = any(layer.rule.has_warmup for layer in subject.decoder.moe_layers())
        switched = training_record.switch_step(origin.checkpoint) if warms_up else None
        record = TrainingRecord.read(origin.run_dir, subject.layers, target, switched)
        if not record.series:
            missing.append(f"{subject.label}: {origin.run_dir / METRICS_FILE} is missing or empty.")
        elif names[subject.label] not in records or switched is not None:
            records[names[subject.label]] = record
    moe = {run: record for run, record in records.items() if record.layers}
    dense = [f"{run}: a dense model has no routing." for run in records if run not in moe]
    thresholds = {run: record for run, record in moe.items() if "routing/cutoff_deviation" in record.series}
    return [
        training_record.gap_section(records, _routing_gap(subjects, collected), missing),
        training_record.usage_section(moe, missing + dense),
        training_record.warmup_section(
            {run: record for run, record in thresholds.items() if record.switched_at_step is not None},
            missing
            + [f"{run}: trained without a warm-up, or the checkpoint is from before its end." for run in moe
               if run not in thresholds or moe[run].switched_at_step is None]
            + dense,
        ),
        training_record.capacity_section(moe, missing + dense),
    ]  # fmt: skip


def _routing_gap(subjects: Sequence[Subject], collected: Collected) -> list[Row]:
    rows: list[Row] = []
    for subject in subjects:
        if not subject.layers:
            continue
        measured = collected.measurements[subject.label].training_routing
        causal, training = measured.causal_loss, measured.loss
        row: dict[str, str | float | None] = {
            "checkpoint": subject.label,
            "tokens": measured.num_tokens,
            "loss, causal routing": causal,
            "loss, training routing": training,
            "causal − training": None if causal is None or training is None else causal - training,
        }
        if measured.missing:
            row["note"] = measured.missing
        elif subject.training_phase is Phase.WARMUP and subject.rule is not None and subject.rule.has_warmup:
            row["note"] = "from its warm-up, when experts still chose their tokens"
        rows.append(row)
    return rows


def facts(
    subjects: Sequence[Subject],
    origins: Mapping[str, Origin],
    collected: Collected,
    domains: Sequence[tuple[str, str]],
    parameters: Mapping[str, tuple[int, int]],
) -> dict[str, list[Row]]:
    """Return the tables at the top of the report.

    Args:
        subjects: checkpoints to analyse.
        origins: label → origin of the checkpoint.
        collected: measurements of the pass over the text.
        domains: name and source of each domain.
        parameters: label → (total, active) parameters.
    """
    checkpoints: list[Row] = []
    for subject in subjects:
        origin, losses = origins[subject.label], collected.measurements[subject.label].losses
        fanout_sums = collected.measurements[subject.label].fanout.by_loss
        measured = float(fanout_sums.total.sum() / fanout_sums.count.sum()) if subject.layers else None
        checkpoints.append(
            {
                "checkpoint": subject.label,
                "routing": origin.rule,
                "step": None if origin.step == RELEASED else origin.step,
                "parameters": parameters[subject.label][0],
                "active": parameters[subject.label][1],
                "loss / nats per token": losses.mean,
                "bits per byte": losses.bits_per_byte(),
                **{f"{name}: bits per byte": losses.bits_per_byte(i) for i, (name, _) in enumerate(domains)},
                "fanout, all layers": measured,
                "target": subject.target * len(subject.layers) if subject.layers else None,
            }
        )
    files: list[Row] = [{"checkpoint": label, "file": str(origin.path)} for label, origin in origins.items()]
    text: list[Row] = [
        {"domain": name, "source": source, "tokens": tokens}
        for (name, source), tokens in zip(domains, collected.num_tokens, strict=True)
    ]
    return {"Checkpoints (routed causally, on all of the text below)": checkpoints, "Files": files, "Text": text}
