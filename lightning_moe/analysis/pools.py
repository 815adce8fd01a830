"""Loss against the pool from which experts choose their tokens (the paper's Fig. 6), in training and at inference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_moe.analysis.observe import Batch, Observation, observe
from lightning_moe.analysis.section import Row, Section
from lightning_moe.model import CausalLM
from lightning_moe.report.figures import GREY, grid, line_style, shared_legend
from lightning_moe.routing import CausalChoice, ExpertChoice, Phase, RoutingRule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEXT = """\
<p>Expert choice compares the tokens of a pool with each other; a threshold compares a token with what many batches
had in common, which is a pool that does not end. Left: loss on the analysed text, routed causally, against the pool
that a checkpoint was <em>trained</em> with; for Expert Threshold that is the memory of its average. Rings: the same
weights routed as in training. Rules without a pool are level lines. Only checkpoints that otherwise had the same
training can be compared. Right: the same weights with experts choosing at <em>inference</em> among so many tokens of
the analysed text (which no generation could do), and as level lines their stored thresholds on the same batches.
Where the line lies above its level, a pool so small costs loss; where both meet, thresholds do as well as seeing all
other tokens.</p>
<p><code>pool of Expert Threshold = N / (1 − β)</code> with N tokens in an optimizer step and decay β.</p>"""


class PoolSweep:
    """Loss with experts choosing among pools of windows, and with the stored thresholds, on the same batches.

    Only full batches without padding count, so that all sizes see the same tokens.

    Args:
        decoder: decoder with thresholds.
        sizes: numbers of windows in a pool; each divides ``batch_size``.
        batch_size: number of windows in a full batch.
    """

    def __init__(self, decoder: CausalLM, sizes: Sequence[int], batch_size: int) -> None:
        self.decoder, self.sizes, self.batch_size = decoder, sorted(set(sizes)), batch_size
        self.num_tokens = 0
        self.causal_nll = 0.0
        self.nll = dict.fromkeys(self.sizes, 0.0)

    def update(self, batch: Batch, seen: Observation) -> None:
        """Add a batch and what was observed under the stored thresholds."""
        if not self.sizes or not seen.is_full(self.batch_size):
            return
        self.num_tokens += seen.valid.numel()
        self.causal_nll += float(seen.loss.double().sum())
        for size in self.sizes:
            with experts_choose(self.decoder, size):
                self.nll[size] += float(observe(self.decoder, batch, Phase.TRAIN).loss.double().sum())

    def losses(self) -> dict[int, float]:
        """Return windows in a pool → nats per token; empty if no batch counted."""
        return {size: nll / self.num_tokens for size, nll in self.nll.items() if self.num_tokens}

    @property
    def causal_loss(self) -> float:
        """Loss with the stored thresholds, in nats per token."""
        return self.causal_nll / self.num_tokens


@contextmanager
def experts_choose(decoder: CausalLM, pool: int) -> Iterator[None]:
    """Inside the block, let training passes route by expert choice among ``pool`` neighbouring sequences."""
    layers = list(decoder.moe_layers())
    before = [layer.rule for layer in layers]
    try:
        for layer in layers:
            layer.rule = ExpertChoice(pool=pool)
        yield
    finally:
        for layer, rule in zip(layers, before, strict=True):
            layer.rule = rule


@dataclass(frozen=True)
class Trained:
    """A checkpoint in the left panel.

    Args:
        rule: routing rule; `None` for a dense model.
        pool: number of tokens of its pool in training, see `training_pool`.
        causal_loss: loss on the full batches of the analysed text or, if it has none, on all of it.
        training_loss: the same loss, routed as in training; `None` if that was not possible.
    """

    rule: RoutingRule | None
    pool: float | None
    causal_loss: float
    training_loss: float | None

    @property
    def by_thresholds(self) -> bool:
        """Whether thresholds chose in training, whose pool is the memory of their average."""
        return (
            self.rule is not None
            and self.rule.causal_choice is CausalChoice.THRESHOLD
            and self.rule.pool_in(Phase.TRAIN) is None
        )

    @property
    def has_pool(self) -> bool:
        """Whether the rule compares tokens with others at all, known how many or not."""
        return self.rule is not None and (self.by_thresholds or self.rule.pool_in(Phase.TRAIN) is not None)


def training_pool(rule: RoutingRule | None, sequence_length: int, config: Mapping[str, Any] | None) -> float | None:
    """Return among how many tokens experts chose in training; `None` for rules without a pool, or if it is not known.

    Args:
        rule: routing rule of the checkpoint.
        sequence_length: number of tokens of a training window.
        config: content of the run's ``config.yaml``; `None` outside of a run.
    """
    pool = None if rule is None else rule.pool_in(Phase.TRAIN)
    if pool == "sequence" or isinstance(pool, int):
        return sequence_length * (1 if pool == "sequence" else pool)
    if rule is None or config is None:
        return None
    sequences: int | None = config["data"].get("global_batch_size")
    if sequences is None:
        return None
    if pool is None:  # thresholds compare a token with all tokens that they average over
        return rule.memory(sequences * sequence_length) if rule.causal_choice is CausalChoice.THRESHOLD else None
    processes = 1 if pool == "global" else _processes(config["trainer"])
    if processes is None:
        return None
    return sequences / int(config["trainer"].get("accumulate_grad_batches", 1)) * sequence_length / processes


def _processes(trainer: Mapping[str, Any]) -> int | None:
    """Return the number of processes of a run; `None` if its configuration does not say it (``devices: auto``)."""
    devices: Any = trainer.get("devices")
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else None
    return None if count is None else count * int(trainer.get("num_nodes", 1))


def section(sweeps: Mapping[str, PoolSweep], trained: Mapping[str, Trained], sequence_length: int) -> Section:
    """Return the section of several checkpoints.

    Args:
        sweeps: label → pools at inference, of checkpoints with thresholds.
        trained: label → pool in training, of all checkpoints.
        sequence_length: number of tokens in an analysed window.
    """
    name, title = "pools", "Loss against the routing pool"
    pooled = {label: found for label, found in trained.items() if found.pool is not None}
    measured = {label: sweep for label, sweep in sweeps.items() if sweep.losses()}
    missing = [
        f"{label}: the pool that it was trained with is not known (its run's folder or trainer.devices would say it)."
        for label, found in trained.items()
        if found.pool is None and found.has_pool
    ]
    compared = len({found.pool for found in pooled.values()}) > 1
    if not compared:
        missing.append("pools in training: give several checkpoints that were trained with different pools.")
    missing += [
        f"{label}: the text has no full batch of {sweep.batch_size} windows to choose from."
        for label, sweep in sweeps.items()
        if sweep.sizes and label not in measured
    ]
    tables = {"pools_in_training": _training_rows(trained), "pools_at_inference": _rows(measured, sequence_length)}
    tables = {table: rows for table, rows in tables.items() if rows and (table != "pools_in_training" or compared)}
    if not tables:
        return Section(name, title, TEXT, missing=missing)
    figure, [axes] = grid(1, len(tables), 4.6, 3.3)
    styles = {label: line_style(index) for index, label in enumerate(trained)}
    if compared:
        _draw_training(axes[0], trained, styles)
    if measured:
        _draw_inference(axes[-1], measured, styles, sequence_length, labelled=not compared)
    shared_legend(figure)
    return Section(name, title, TEXT, tables, {name: figure}, summary=_summary(tables), missing=missing)


def _training_rows(trained: Mapping[str, Trained]) -> list[Row]:
    return [
        {"checkpoint": label, "pool_tokens": t.pool, "loss_causal": t.causal_loss, "loss_as_trained": t.training_loss}
        for label, t in trained.items()
    ]


def _rows(measured: Mapping[str, PoolSweep], sequence_length: int) -> list[Row]:
    return [
        {
            "checkpoint": label,
            "windows": size,
            "pool_tokens": size * sequence_length,
            "loss": loss,
            "loss_causal": sweep.causal_loss,
        }
        for label, sweep in measured.items()
        for size, loss in sweep.losses().items()
    ]


def _summary(tables: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Return a row per checkpoint and pool at inference; if there are none, the rows of training."""
    if "pools_at_inference" not in tables:
        return list(tables["pools_in_training"])
    return [
        {
            "checkpoint": row["checkpoint"],
            "pool at inference / tokens": row["pool_tokens"],
            "loss / nats per token": row["loss"],
            "the same by thresholds": row["loss_causal"],
        }
        for row in tables["pools_at_inference"]
    ]


def _draw_training(axis: Axes, trained: Mapping[str, Trained], styles: Mapping[str, Any]) -> None:
    for label, found in trained.items():
        color = styles[label]["color"]
        if found.pool is None:
            if not found.has_pool:
                axis.axhline(found.causal_loss, linewidth=1.2, label=label, **styles[label])
            continue
        marker = "*" if found.by_thresholds else "o"
        axis.plot(found.pool, found.causal_loss, marker, color=color, markersize=9, label=label)
        if found.training_loss is not None:
            axis.plot(found.pool, found.training_loss, "o", color=color, markersize=9, fillstyle="none")
    axis.plot([], [], "o", color=GREY, markersize=9, fillstyle="none", label="routed as in training")
    axis.set_xlabel("pool in training / tokens")
    _finish(axis, [found.pool for found in trained.values() if found.pool is not None])


def _draw_inference(
    axis: Axes, measured: Mapping[str, PoolSweep], styles: Mapping[str, Any], sequence_length: int, labelled: bool
) -> None:
    for label, sweep in measured.items():
        losses, color = sweep.losses(), styles[label]["color"]
        pools = [size * sequence_length for size in losses]
        (line,) = axis.plot(pools, list(losses.values()), marker="o", markersize=4, color=color)
        line.set_label(label if labelled else f"_{label}")
        axis.axhline(sweep.causal_loss, color=color, linestyle=":", linewidth=1.4)
    axis.plot([], [], ":", color=GREY, label="stored thresholds")
    axis.set_xlabel("pool at inference / tokens")
    _finish(axis, [size * sequence_length for sweep in measured.values() for size in sweep.losses()])


def _finish(axis: Axes, pools: Sequence[float]) -> None:
    """Scale and label the axes, with powers of two as ticks, or only some of them for a wide range."""
    first, last = int(min(pools)).bit_length() - 1, int(max(pools)).bit_length()
    ticks = [2**power for power in range(first, last + 1, -(-(last + 1 - first) // 7))]
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:,}" if tick < 2**20 else f"{tick / 2**20:g} Mi" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlim(min(pools) / 1.3, max(pools) * 1.3)
    axis.set_ylabel("loss / nats per token")
