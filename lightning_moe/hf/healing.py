"""Healing: a released model under another routing rule, of which a few parameters are trained.

The teacher of a distillation is the same model with the released routing: all weights are shared but the trained ones,
of which the teacher has copies. Nothing of the untouched model is held twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_moe.errors import UserError
from lightning_moe.hf.digest import model_digest
from lightning_moe.hf.distill import distillation_loss
from lightning_moe.hf.load import load_model
from lightning_moe.hf.model import TransformersLM
from lightning_moe.hf.pretrained import KEY, PretrainedConfig
from lightning_moe.hf.sidecar import SIDECAR_FILE, is_sidecar, read_sidecar, use_sidecar
from lightning_moe.hf.trainable import make_trainable, router_parameters, without_effect
from lightning_moe.model import DecoderLoss
from lightning_moe.routing import CausalChoice, RoutingRule, RoutingState


@dataclass
class HealingLoss(DecoderLoss):
    """A `DecoderLoss` whose ``loss`` is that of a healing.

    Args:
        distillation: mean KL divergence from the untouched model, times T², fp32 [], detached; `None` without one.
    """

    distillation: Tensor | None = None


class Healing:
    """A released model that is trained for another routing rule.

    Args:
        config: settings; ``path`` is not null.
        rule: routing rule of all MoE layers.
        max_sequence_length: number of tokens of context.

    Attributes:
        lm: the model. Its ``state_dict`` has the trained tensors and the routing state only.
        trained: trained parameters by their names in ``lm``.
        digest: digest of the model as it was released.

    Raises:
        UserError: the model cannot be loaded or trained so, or the rule, the number of experts per token or the
            thresholds do not fit it.
    """

    def __init__(self, config: PretrainedConfig, rule: RoutingRule | None, max_sequence_length: int) -> None:
        if rule is None:
            raise UserError(
                "model.routing=null: a released model keeps its experts; give the rule that it is trained for, such as "
                "--config routing/expert_threshold"
            )
        self.config = config
        self.lm = lm = _open(config, max_sequence_length)
        self.digest = model_digest(lm)
        self._released_flops = lm.size.flops_per_token
        config.check_num_experts_per_token(lm.num_experts)
        calibrated = _calibrated(lm, config)
        self.trained = make_trainable(lm, config)
        self._originals = without_effect(self.trained)
        _route(lm, config, rule, calibrated)
        _hold_only(lm, set(self.trained) | {name for name in lm.state_dict() if name.startswith("moe.")})

    @property
    def description(self) -> dict[str, Any]:
        """What a checkpoint records: the settings, and the digest of the model."""
        return {**dataclasses.asdict(self.config), "digest": self.digest}

    @property
    def sizes(self) -> dict[str, Any]:
        """What a checkpoint records as ``decoder``: the sizes of the model."""
        lm = self.lm
        rates = [layer.state.num_experts_per_token for layer in lm.layers]
        return {
            "vocab_size": lm.vocab_size,
            "max_sequence_length": lm.max_sequence_length,
            "num_experts": lm.num_experts,
            "num_experts_per_token": rates[0] if len(set(rates)) == 1 else rates,
        }

    @property
    def flops_per_token(self) -> int:
        """FLOPs of a training token: passes forward and backward without the gradients of frozen weights, and the
        teacher's forward pass."""
        return (2 * self.lm.size.flops_per_token + (self._released_flops if self.config.distill else 0)) // 3

    @property
    def routers(self) -> set[nn.Parameter]:
        """The trained parameters of the routers."""
        return router_parameters(self.lm) & set(self.trained.values())

    @torch.no_grad()
    def teacher(self, input_ids: Tensor) -> Tensor:
        """Compute `TransformersLM.features` of the untouched model: int64 [B, S] → [B, S, D]."""
        self._originals = {name: self._originals[name].to(parameter.device) for name, parameter in self.trained.items()}
        with self.lm.as_released():
            features: Tensor = functional_call(_Features(self.lm), _under("lm", self._originals), (input_ids,))
        return features

    def loss(self, input_ids: Tensor, labels: Tensor) -> HealingLoss:
        """Compute the training loss: int64 [B, S], labels already shifted."""
        weight = self.config.distill
        if not weight:
            output = self.lm(input_ids, labels=labels)
            assert isinstance(output, DecoderLoss)
            return HealingLoss(output.loss, output.token_loss, output.aux_loss)
        target = self.teacher(input_ids)
        features = self.lm.features(input_ids)
        token_loss, divergence = distillation_loss(
            features, target, self.lm.to_logits, labels, self.lm.vocab_size, self.config.temperature
        )
        loss, kl = token_loss.mean(), divergence.mean()
        total = kl if weight == 1 else (1 - weight) * loss + weight * kl
        return HealingLoss(total, token_loss.detach(), self.lm.aux_loss(), distillation=kl.detach())


def _hold_only(lm: TransformersLM, names: set[str]) -> None:
    """Let ``state_dict`` and ``load_state_dict`` of a model have these tensors only."""

    def drop_others(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in [name for name in state if name.startswith(prefix) and name.removeprefix(prefix) not in names]:
            del state[name]

    def miss_no_others(module: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if any(key.endswith(name) for name in names)]

    lm.register_state_dict_post_hook(drop_others)
    lm.register_load_state_dict_post_hook(miss_no_others)


class _Features(nn.Module):
    """The features of a model as a module's forward pass, for ``functional_call``."""

    def __init__(self, lm: TransformersLM) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm.features(input_ids)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _open(config: PretrainedConfig, max_sequence_length: int) -> TransformersLM:
    assert config.path is not None
    where = f"{KEY}.path={config.path}"
    try:
        lm = load_model(config.path, getattr(torch, config.dtype), max_sequence_length=max_sequence_length)
    except UserError as error:
        folder = str(Path(config.path).expanduser())
        raise UserError(
            str(error).replace(f"--model {folder}", where).replace(f"--model {config.path}", where)
        ) from None
    if max_sequence_length > lm.max_sequence_length:
        raise UserError(
            f"data.sequence_length={max_sequence_length}: the context of {config.path} has {lm.max_sequence_length} "
            "tokens at most"
        )
    return lm


def _calibrated(lm: TransformersLM, config: PretrainedConfig) -> list[RoutingState] | None:
    """Return the states of the thresholds to start from, layer by layer; `None` for none."""
    if config.thresholds is None:
        return None
    folder = Path(config.thresholds).expanduser()
    if not is_sidecar(folder):
        raise UserError(f"{KEY}.thresholds={config.thresholds}: has no {SIDECAR_FILE}; `calibrate --model` writes one")
    use_sidecar(lm, read_sidecar(folder))
    return [layer.state for layer in lm.layers]


@torch.no_grad()
def _route(
    lm: TransformersLM, config: PretrainedConfig, rule: RoutingRule, calibrated: Sequence[RoutingState] | None
) -> None:
    wanted = config.num_experts_per_token
    try:
        for layer in lm.layers:
            layer.route_by(rule, layer.top_k if wanted is None else wanted)
    except UserError as error:
        raise UserError(str(error).replace("model.decoder.", f"{KEY}.")) from None
    for layer, found in zip(lm.layers, calibrated or (), strict=calibrated is not None):
        where = f"{KEY}.thresholds={config.thresholds}"
        if rule.causal_choice is not CausalChoice.THRESHOLD:
            raise UserError(f"{where}: model.routing={type(rule).__name__} chooses by no thresholds; leave one out")
        if found.num_experts_per_token != layer.state.num_experts_per_token:
            raise UserError(
                f"{where}: was made for {found.num_experts_per_token:g} experts per token, but "
                f"{KEY}.num_experts_per_token is {layer.state.num_experts_per_token:g}; must be the same"
            )
        buffers = dict(found.named_buffers())
        for name, buffer in layer.state.named_buffers():
            if name in buffers and buffers[name].shape == buffer.shape:
                buffer.copy_(buffers[name])
