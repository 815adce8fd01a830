"""The model whose thresholds are set: one with a threshold rule and the checkpoint's weights.

| the checkpoint's rule chooses at inference by | becomes |
|---|---|
| thresholds (expert threshold, expert choice) | the same rule |
| top-k (token choice of any kind) | expert threshold: the same router and experts, chosen by thresholds |
| dense | expert threshold: each network is cut into the shared expert and one slice per expert of a token, and every
  expert starts as a copy of a slice (sparse upcycling, arXiv 2212.05055); routers are new |
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.model import DecoderConfig
from lightning_moe.module import LanguageModel
from lightning_moe.routing import CausalChoice, ExpertThreshold, rule_from_config


@dataclass(frozen=True)
class Target:
    """The model to calibrate.

    Args:
        model: module whose thresholds are to be set, in ``eval()``.
        hyper_parameters: hyper-parameters of that module, for its checkpoint.
        same_parameters: whether the source's optimizer state still fits.
    """

    model: LanguageModel
    hyper_parameters: dict[str, Any]
    same_parameters: bool


def target_model(
    hyper_parameters: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    num_experts_per_token: float | Sequence[float] | None = None,
    seed: int = 1,
) -> Target:
    """Build the model that gets calibrated thresholds.

    Args:
        hyper_parameters: hyper-parameters of the checkpoint.
        state_dict: weights and routing state of the checkpoint.
        num_experts_per_token: new mean number of experts per token, one value or one per MoE layer; `None` keeps it.
        seed: random seed for the routers of an upcycled dense model.

    Raises:
        UserError: the rule keeps no thresholds and cannot be replaced, or the numbers do not fit.
    """
    rule = rule_from_config(hyper_parameters["routing"])
    if rule is not None and rule.causal_choice is None:
        raise UserError(
            f"model.routing={type(rule).__name__}: there is nothing to calibrate, because it declares neither "
            "thresholds nor a top-k as its causal_choice."
        )
    has_thresholds = rule is not None and rule.causal_choice is CausalChoice.THRESHOLD
    changed = copy.deepcopy(dict(hyper_parameters))
    if hyper_parameters.get("pretrained") is not None:
        return _healed(changed, state_dict, has_thresholds, num_experts_per_token)
    config = DecoderConfig(**hyper_parameters["decoder"])
    if not has_thresholds:
        changed["routing"] = ExpertThreshold().to_config()
    if num_experts_per_token is not None:
        if rule is None:
            raise UserError(
                "--num_experts_per_token: a dense model is cut into as many slices as its configuration has experts "
                "per token; upcycle it first, and calibrate the result."
            )
        value = num_experts_per_token
        changed["decoder"]["num_experts_per_token"] = list(value) if isinstance(value, Sequence) else value
        # dense first layers keep the size that they were trained with
        changed["decoder"]["dense_hidden_size"] = config.dense_size(config.rates_per_layer[0])
    state = dict(state_dict)
    if rule is None:
        state = _upcycled(config, state, seed)
    model = LanguageModel.from_hyperparameters(changed)
    fresh = model.state_dict()  # the routing state, which may have other names and shapes, is set by the calibration
    weights = {name: state[name] if ".moe.state." not in name else value for name, value in fresh.items()}
    try:
        model.load_state_dict(weights)
    except (RuntimeError, KeyError) as error:
        raise UserError(f"the checkpoint's weights do not fit its configuration: {error}") from error
    if has_thresholds:  # until its thresholds are set, a layer routes as it did
        model.load_state_dict(
            {name: value for name, value in state.items() if name in fresh and value.shape == fresh[name].shape},
            strict=False,
        )
    return Target(model.eval(), changed, same_parameters=rule is not None)


def _healed(
    changed: dict[str, Any],
    state_dict: Mapping[str, Tensor],
    has_thresholds: bool,
    num_experts_per_token: float | Sequence[float] | None,
) -> Target:
    """Build the target of a healed model, whose routers are in its checkpoint and whose experts are not."""
    if isinstance(num_experts_per_token, Sequence):
        raise UserError("--num_experts_per_token: a healed model has one number for all MoE layers.")
    if not has_thresholds:
        changed["routing"] = ExpertThreshold().to_config()
    if num_experts_per_token is not None:
        for sizes in ("decoder", "pretrained"):
            changed[sizes]["num_experts_per_token"] = num_experts_per_token
    model = LanguageModel.from_hyperparameters(changed)
    state = {
        name: found if name not in state_dict or state_dict[name].shape != found.shape else state_dict[name]
        for name, found in model.state_dict().items()
    }
    model.load_state_dict(state)
    return Target(model.eval(), changed, same_parameters=True)


def _upcycled(config: DecoderConfig, state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return the weights of a dense model as those of shared and routed experts, under the MoE model's names."""
    if config.num_moe_layers == 0:
        raise UserError(
            f"model.decoder.num_dense_layers={config.num_dense_layers}: all {config.num_layers} layers stay dense."
        )
    generator = torch.Generator().manual_seed(seed)
    size, shared = config.expert_size, config.num_shared_experts * config.expert_size
    for layer in range(config.num_dense_layers, config.num_layers):
        rate = config.rates_per_layer[layer]
        if rate != int(rate) or config.dense_hidden_size is not None:
            raise UserError(
                f"model.decoder.num_experts_per_token={rate:g}, dense_hidden_size={config.dense_hidden_size}: a dense "
                "network can be cut into experts where it has the size of shared + whole routed experts."
            )
        slices = [shared + (expert % int(rate)) * size for expert in range(config.num_experts)]
        dense, moe = f"decoder.blocks.{layer}.feed_forward.", f"decoder.blocks.{layer}.moe."
        for name in ("up", "gate"):
            weight = state.pop(f"{dense}{name}.weight", None)  # [F of all, D]
            if weight is not None:
                if shared:
                    state[f"{moe}shared_expert.{name}.weight"] = weight[:shared].clone()
                state[f"{moe}experts.{name}"] = torch.stack([weight[start : start + size].t() for start in slices])
        weight = state.pop(f"{dense}down.weight")  # [D, F of all]
        if shared:
            state[f"{moe}shared_expert.down.weight"] = weight[:, :shared].clone()
        state[f"{moe}experts.down"] = torch.stack([weight[:, start : start + size].t() for start in slices])
        router = torch.randn(config.num_experts, config.hidden_size, generator=generator) * config.hidden_size**-0.5
        state[f"{moe}router.weight"] = router
        if config.router == "cosine":
            state[f"{moe}router.scale"] = torch.full((1,), config.hidden_size**0.5)
    return state
