"""The metrics of this package: their names, their formats, and where they show.

To add a metric, compute it and add an entry here. The reduction over layers, the tables of a run, of comparisons and of
studies, the labels of figures, and MLflow's columns and charts follow from the entry. This module imports nothing else
of the package, so that printing a table needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Literal, NamedTuple

EVALUATED = ("val", "test")
ROUTED = ("routing", "val_routing", "test_routing")
_LONGEST_PART = 200  # of a name, of which MLflow takes 250 characters


@dataclass(frozen=True)
class MetricInfo:
    """One metric.

    Args:
        name: last part of the logged name, and the key in ``summary.json``.
        title: name for readers, in tables of one run and in figures.
        format: format specification of the printed number.
        logged: first parts of the logged names, such as ``val`` for ``val/loss``; empty for a number that only the
            summary has.
        unit: unit of the printed number; empty for shares, counts, ratios, and if the title says it.
        over_layers: reduction of the values of all layers to one number; `None` if single layers have no value.
        per_expert: whether the logged value is that of one expert, ``routing/layer_03/load/expert_07``.
        per_domain: whether the logged value is that of one domain of the text, ``val/domain_loss/code``.
        heading: title of a column over several runs; empty for ``title``.
        scale: divisor of the value in a column over several runs.
        tables: tables that show it: ``scores``, ``domains``, ``layers`` of one run; ``comparison``, ``study`` of many.
        mlflow_columns: entries of ``logged`` that MLflow's table of runs shows.
        mlflow_charts: entries of ``logged`` that MLflow draws at first.
    """

    name: str
    title: str
    format: str
    logged: tuple[str, ...]
    unit: str = ""
    over_layers: Literal["max", "mean", "sum"] | None = None
    per_expert: bool = False
    per_domain: bool = False
    heading: str = ""
    scale: int = 1
    tables: tuple[str, ...] = ()
    mlflow_columns: tuple[str, ...] = ()
    mlflow_charts: tuple[str, ...] = ()

    def text(self, value: float | None) -> str:
        """Return a value with its unit, as in a table of one run."""
        return "unknown" if value is None else f"{value:{self.format}} {self.unit}".rstrip()

    @property
    def label(self) -> str:
        """Label of an axis."""
        return f"{self.title}\n/ {self.unit}" if self.unit else self.title


#: in the order in which tables show them
_METRICS = (
    MetricInfo(
        "loss", "loss", ".4f", ("train", *EVALUATED), "nats per token", heading="val loss",
        tables=("scores", "comparison", "study"), mlflow_columns=("val",), mlflow_charts=("train", "val"),
    ),
    MetricInfo(
        "perplexity", "perplexity", ".2f", EVALUATED, tables=("scores",), mlflow_charts=("val",)
    ),
    MetricInfo(
        "bits_per_byte", "bits per byte", ".4f", EVALUATED,
        tables=("scores", "comparison", "study"), mlflow_columns=("val",), mlflow_charts=("val",),
    ),
    MetricInfo(
        "domain_loss", "loss", ".4f", EVALUATED, "nats per token", per_domain=True,
        tables=("domains",), mlflow_charts=("val",),
    ),
    MetricInfo("aux_loss", "auxiliary loss", ".4f", ("train",)),
    MetricInfo("distillation_loss", "divergence from the released model", ".4f", ("train",), "nats per token"),
    MetricInfo("gradient_norm", "gradient norm before clipping", ".3f", ("train",), mlflow_charts=("train",)),
    MetricInfo("muon_learning_rate", "learning rate, Muon", ".3g", ("train",), mlflow_charts=("train",)),
    MetricInfo("adamw_learning_rate", "learning rate, AdamW (largest group)", ".3g", ("train",)),
    MetricInfo("tokens_seen", "tokens seen", ",.0f", ("train",), mlflow_charts=("train",)),
    MetricInfo(
        "max_load", "max/mean load", ".2f", ROUTED, over_layers="max",
        tables=("layers", "comparison", "study"),
        mlflow_columns=("val_routing",), mlflow_charts=("routing", "val_routing"),
    ),
    MetricInfo("load_cv", "load: std / mean\nover experts", ".3f", ROUTED, over_layers="max"),
    MetricInfo("load", "load / mean of the layer", ".2f", ROUTED, per_expert=True),
    MetricInfo(
        "dead_experts", "dead experts", ".0f", ROUTED, over_layers="sum", tables=("layers",)
    ),
    MetricInfo(
        "fanout_mean", "mean fanout", ".3f", ROUTED, over_layers="mean", tables=("layers", "comparison", "study")
    ),
    MetricInfo("fanout_0_share", "share of tokens without routed experts", ".3f", ROUTED, over_layers="mean"),
    MetricInfo("fanout_1_share", "share of tokens with one routed expert", ".3f", ROUTED, over_layers="mean"),
    MetricInfo("fanout_2plus_share", "share of tokens with more routed experts", ".3f", ROUTED, over_layers="mean"),
    MetricInfo("saturation_rate", "saturation rate", ".3f", ("routing",), over_layers="mean"),
    MetricInfo("starvation_rate", "starvation rate", ".3f", ("routing",), over_layers="mean"),
    MetricInfo(
        "cutoff_deviation", "|cutoff − threshold|", ".3f", ("routing",), "logit units",
        over_layers="max",
    ),
    MetricInfo("logit_std", "std of the router logits", ".3f", ("routing",), over_layers="mean"),
    MetricInfo("gate_std", "std of the gates", ".3f", ("routing",), over_layers="mean"),
    MetricInfo("raw_fanout_mean", "raw usage", ".3f", ("routing",), over_layers="mean"),
    MetricInfo("warmup_deviation", "|raw load − target| / target", ".3f", ("routing",)),
    MetricInfo(
        "flops_per_token", "FLOPs per token", ",.2f", (),
        heading="active MFLOPs/token", scale=10**6, tables=("comparison",),
    ),
    MetricInfo(
        "tokens_per_second", "tokens per second", ",.0f", ("throughput",), heading="tokens/s",
        tables=("comparison",), mlflow_columns=("throughput",), mlflow_charts=("throughput",),
    ),
    MetricInfo("flops_per_second", "FLOP/s", ".3e", ("throughput",)),
    MetricInfo("mfu", "model FLOPs utilisation", ".1%", ("throughput",)),
    MetricInfo("data_wait_share", "share of the time waiting for data", ".1%", ("throughput",)),
)  # fmt: skip
CATALOGUE = {metric.name: metric for metric in _METRICS}


def shown_in(table: str) -> list[MetricInfo]:
    """Return the metrics of a table, in the order of its columns."""
    return [metric for metric in _METRICS if table in metric.tables]


def domain_parts(domains: Sequence[str]) -> list[str]:
    """Return what stands for each domain in a metric's name, such as ``code`` in ``val/domain_loss/code``.

    A domain is any text, and MLflow refuses names with many characters. So all but letters, digits and ``_ - .`` become
    ``_``, as does a dot at the start, and the end of a long domain is cut off. If that makes a domain like another one,
    it gets a number: ``c++`` becomes ``c__``, or ``c___2`` beside a domain that is called ``c__``.

    Args:
        domains: different names, in an order that is the same in each run.
    """
    cleaned = [re.sub(r"[^\w.-]|^\.", "_", domain)[:_LONGEST_PART] or "_" for domain in domains]
    taken = set(cleaned) & set(domains)
    parts = []
    for domain, part in zip(domains, cleaned, strict=True):
        if part != domain:
            numbered = (f"{part}_{number}" for number in count(2))
            part = next(name for name in chain([part], numbered) if name not in taken)
            taken.add(part)
        parts.append(part)
    return parts


class LoggedName(NamedTuple):
    """The parts of a name such as ``val_routing/layer_03/max_load``.

    Args:
        group: first part.
        layer: name of the layer; `None` for all layers together.
        metric: entry of the catalogue.
        of: ``expert_07``, or the domain's part; `None` for a metric that is neither per expert nor per domain.
    """

    group: str
    layer: str | None
    metric: MetricInfo
    of: str | None


def parse(logged: str) -> LoggedName | None:
    """Split a logged name into its parts; return `None` for one that the catalogue does not have."""
    found = re.fullmatch(r"(\w+)/(?:(layer_\d+\w*)/)?(\w+)(?:/([\w.-]+))?", logged)
    if found is None:
        return None
    group, layer, name, of = found.groups()
    metric = CATALOGUE.get(name)
    if metric is None or group not in metric.logged or (metric.per_expert or metric.per_domain) != bool(of):
        return None
    if metric.per_expert and not re.fullmatch(r"expert_\d+", of):
        return None
    has_layers = metric.over_layers is not None or metric.per_expert
    return LoggedName(group, layer, metric, of) if has_layers or layer is None else None
