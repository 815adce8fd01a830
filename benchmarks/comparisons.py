"""The comparisons by name. Each yields rows: what was compared, at which size, and every case's number."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks import layers, loss, models
from benchmarks.setup import Row, Setup

COMPARISONS: dict[str, Callable[[Setup], Iterator[Row]]] = {
    "layer": layers.layer,
    "products": layers.products,
    "memory": layers.memory,
    "scaling": layers.scaling,
    "loss": loss.loss,
    "step": models.step,
    "step_costs": models.step_costs,
    "lengths": models.lengths,
    "compile": models.compiled,
    "decoding": models.decoding,
    "overhead": models.overhead,
}
