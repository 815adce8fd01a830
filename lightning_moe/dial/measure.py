"""The loss at several mean numbers of experts per token, by several methods, on the same windows of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_moe.calibrate import Measurement, Windows, difference, measure
from lightning_moe.dial.methods import METHODS, TOP_K, refusal, use_method
from lightning_moe.hf import TransformersLM

#: times what the model was released with
DEFAULT_FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Point:
    """A method at one mean number of experts per token.

    Args:
        method: key of `METHODS`.
        target: experts per token asked for in each MoE layer.
        released: whether this is how the model was released.
        p: parameter of each MoE layer, of methods that have one; else empty.
        measured: losses and loads on text that did not calibrate.
        over_top_k: mean difference of the loss to top-k with the same target, and its standard error; `None` if the
            target is no whole number.
    """

    method: str
    target: float
    released: bool
    p: tuple[float, ...]
    measured: Measurement
    over_top_k: tuple[float, float] | None

    @property
    def num_experts_per_token(self) -> float:
        """Measured mean over tokens and MoE layers."""
        return self.target * sum(self.measured.fanout) / len(self.measured.fanout)

    @property
    def busiest(self) -> float:
        """Load of the busiest expert of all MoE layers, over the mean load of its layer."""
        return max(float(usage.max() / usage.mean()) for usage in self.measured.usage)


def default_targets(lm: TransformersLM) -> list[float]:
    """Return whole numbers around what the model was released with, ascending."""
    released = lm.layers[0].top_k
    return sorted({float(min(lm.num_experts, max(1, round(factor * released)))) for factor in DEFAULT_FACTORS})


def dial(
    lm: TransformersLM,
    targets: Sequence[float],
    calibration: Windows,
    unused: Windows,
    progress: Callable[[], object] = lambda: None,
) -> list[Point]:
    """Measure every method at every mean that it can serve, and the model as released.

    Args:
        lm: model; it routes as released afterwards.
        targets: mean numbers of experts per token.
        calibration: text that sets the parameters.
        unused: other text, on which losses and loads are measured.
        progress: called after every point.

    Returns:
        Points by target and in the order of `METHODS`.
    """
    points = []
    for target in sorted({*targets, float(lm.layers[0].top_k)}):
        top_k: Tensor | None = None  # losses of the windows
        for method in METHODS:
            if refusal(lm, method, target) is not None:
                continue
            use_method(lm, method, target, lambda: (batch[:, :-1] for batch in calibration))
            measured = measure(lm, unused)
            if method == TOP_K:
                top_k = measured.window_losses
            over = None if top_k is None else difference(measured.window_losses, top_k)
            p = tuple(float(layer.state["p"]) for layer in lm.layers if "p" in layer.state)
            released = method == TOP_K and all(layer.top_k == target for layer in lm.layers)
            points.append(Point(method, target, released, p, measured, over))
            progress()
    for layer in lm.layers:
        layer.route_by(layer.released, layer.top_k)
    return points
