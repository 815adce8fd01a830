"""Ways to choose experts that can be set to the same mean number of experts per token."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from lightning_moe.calibrate import calibrate
from lightning_moe.hf import TransformersLM
from lightning_moe.hf.layer import TransformersLayer
from lightning_moe.hf.mass_rules import MinP, TopP
from lightning_moe.routing import ExpertThreshold, RoutingRule

TOP_K, THRESHOLDS, BALANCED = "top-k", "thresholds", "balanced thresholds"
#: name of a method → its rule for a layer
METHODS: dict[str, Callable[[TransformersLayer], RoutingRule]] = {
    TOP_K: lambda layer: layer.released,
    "top-p": lambda layer: TopP(layer.released),
    "min-p": lambda layer: MinP(layer.released),
    THRESHOLDS: lambda layer: ExpertThreshold(),
    BALANCED: lambda layer: ExpertThreshold(),
}


def refusal(lm: TransformersLM, method: str, num_experts_per_token: float) -> str | None:
    """Return why a method cannot give a token that many experts on average; `None` if it can.

    Args:
        lm: model.
        method: key of `METHODS`.
        num_experts_per_token: wanted mean, above 0 and at most the number of experts.
    """
    if method in (THRESHOLDS, BALANCED):
        return None
    most = min(layer.released.most(lm.num_experts) for layer in lm.layers)
    if num_experts_per_token > most:
        return f"the model chooses among {most} of its {lm.num_experts} experts"
    if method == TOP_K and num_experts_per_token != int(num_experts_per_token):
        return "all tokens get the same whole number of experts"
    if num_experts_per_token < 1:
        return "a token gets at least one expert"
    return None


def use_method(
    lm: TransformersLM, method: str, num_experts_per_token: float, batches: Callable[[], Iterable[Tensor]]
) -> None:
    """Let a model choose experts by a method, with parameters that meet the mean on a text in every MoE layer.

    Args:
        lm: model, which is changed.
        method: key of `METHODS`, for which there is no `refusal`.
        num_experts_per_token: mean number of experts per token.
        batches: function that starts a reading of the text, in batches int64 [B, S].
    """
    for layer in lm.layers:
        layer.route_by(METHODS[method](layer), num_experts_per_token)
    if method != TOP_K:
        calibrate(lm, batches, keep_loads=method == THRESHOLDS)
