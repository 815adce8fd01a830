"""Choosing what is trained of a released model, and freezing the rest.

Trained tensors are fp32. In a model of another dtype the modules see them rounded to that dtype
(``torch.nn.utils.parametrize``): an update of bf16 weights by a small rate would be lost.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_moe.errors import UserError
from lightning_moe.hf.model import TransformersLM
from lightning_moe.hf.pretrained import PretrainedConfig
from lightning_moe.model import DecoderLoss, replay


class RoundTo(nn.Module):
    """A parametrization that rounds a tensor to a dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype)


def make_trainable(lm: TransformersLM, config: PretrainedConfig) -> dict[str, nn.Parameter]:
    """Freeze a model but for what is trained.

    Args:
        lm: model as it was released.
        config: parts to train.

    Returns:
        The trained parameters by their names in ``lm``, fp32, in the order of the model.

    Raises:
        UserError: peft is missing, or the model has nothing of a part.
    """
    lm.requires_grad_(False)
    chosen = {id(tensor) for part in config.train if part != "lora" for tensor in _parameters(lm, part)}
    names = [name for name, parameter in lm.named_parameters() if id(parameter) in chosen]
    names = _reached(lm, names) if names else []
    for name in names:
        _train_in_fp32(lm, name)
    if "lora" in config.train:
        add_adapters(lm, config.lora_rank)
    return {name: parameter for name, parameter in lm.named_parameters() if parameter.requires_grad}


def router_parameters(lm: TransformersLM) -> set[nn.Parameter]:
    """Return the parameters of all routers."""
    return {parameter for layer in lm.layers for parameter in layer.router.parameters()}


def _parameters(lm: TransformersLM, part: str) -> list[nn.Parameter]:
    if part == "routers":
        return list(router_parameters(lm))
    norms = [module for module in lm.model.modules() if type(module).__name__.endswith("Norm")]
    found = [parameter for module in norms for parameter in module.parameters()]
    if not found:
        raise UserError(f"model.pretrained.train: {type(lm.model).__name__} has no {part}.")
    return found


def _reached(lm: TransformersLM, names: list[str]) -> list[str]:
    """Return the names of the parameters that the loss depends on, by a backward pass.

    A bias that only shifts the released choice of experts, for example, has no part in any gate.
    """
    parameters = dict(lm.named_parameters())
    wanted = [parameters[name] for name in names]
    ids = lm.probe()
    with torch.no_grad(), lm.as_released():
        lm(ids)
    masks = [layer.record.selection.mask for layer in lm.layers if layer.record is not None]
    for parameter in wanted:
        parameter.requires_grad_(True)
    with replay(lm, masks):
        output = lm(ids, labels=ids)
    assert isinstance(output, DecoderLoss)
    gradients = torch.autograd.grad(output.loss, wanted, allow_unused=True)
    for parameter in wanted:
        parameter.requires_grad_(False)
    return [name for name, gradient in zip(names, gradients, strict=True) if gradient is not None]


def _train_in_fp32(lm: TransformersLM, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    owner = lm.get_submodule(path)
    parameter = owner.get_parameter(leaf)
    parameter.requires_grad_(True)
    if parameter.dtype not in (torch.float32, torch.float64):
        setattr(owner, leaf, nn.Parameter(parameter.detach().float()))
        parametrize.register_parametrization(owner, leaf, RoundTo(parameter.dtype), unsafe=True)


def add_adapters(lm: TransformersLM, rank: int) -> None:
    """Put low-rank adapters at the linear layers outside of routers, experts and head; they begin without effect.

    Experts of most families are one tensor [E, …] per layer, which an adapter of a linear layer cannot wrap.

    Raises:
        UserError: peft is missing, or there are no such layers.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("model.pretrained.train: lora needs peft: pip install -e '.[lora]' in a checkout") from None
    apart = {id(module) for layer in lm.layers for part in (layer.router, layer.experts) for module in part.modules()}
    apart.add(id(lm.model.get_output_embeddings()))
    targets = [
        f"released.{path}"
        for path, module in lm.model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in apart
    ]
    if not targets:
        raise UserError(f"model.pretrained.train: {type(lm.model).__name__} has no linear layers for lora.")
    trained = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    options = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets)
    # In a model with a `config`, peft takes gate_proj and up_proj of dense layers for names of experts (peft 0.21).
    inject_adapter_in_model(options, nn.ModuleDict({"released": lm.model}))
    for name, parameter in lm.model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(".lora_" in name)
    for parameter in trained:
        parameter.requires_grad_(True)


def without_effect(trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return copies of the tensors as they are before the first step, under which the model is the released one."""
    return {name: parameter.detach().clone() for name, parameter in trained.items()}


@torch.no_grad()
def fold(lm: TransformersLM) -> None:
    """Make the model a plain one of its family again: adapters merged, trained weights in the dtype of the rest."""
    for path, module in list(lm.model.named_modules()):
        if hasattr(module, "merge") and hasattr(module, "get_base_layer"):
            module.merge()
            parent, _, leaf = path.rpartition(".")
            setattr(lm.model.get_submodule(parent), leaf, module.get_base_layer())
    for module in list(lm.model.modules()):
        if parametrize.is_parametrized(module):
            assert isinstance(module.parametrizations, nn.ModuleDict)
            for leaf in list(module.parametrizations):
                value = getattr(module, leaf).detach().clone()
                parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
                setattr(module, leaf, nn.Parameter(value, requires_grad=False))
