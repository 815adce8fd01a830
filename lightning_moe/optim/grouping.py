"""Which parameter is trained by which rule, and how fast.

A parameter's role follows from its name in the module tree and its shape (``parameter_role``); nothing here imports the
model, so another module gets sensible groups too.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_moe.errors import UserError
from lightning_moe.optim.muon_adamw import MuonAdamW

Rule = Literal["muon", "adamw"]

# In order of precedence: a parameter that stands in two places has the first of its roles. So a tied embedding is
# trained as the head, because the logits are more sensitive to its rate (decision 19).
ROLES = ("head", "embedding", "router", "experts", "matrices", "other")
HEAD_NAMES = ("head", "lm_head")
ROUTER_NAMES = ("router",)


@dataclass(frozen=True)
class OptimizerConfig:
    """Rules and peak learning rates. The defaults are those of the Expert Threshold paper (and of nanochat).

    Args:
        matrix_rule: rule of the matrices of the blocks: attention, feed-forward, experts (each expert alone).
        router_rule: rule of the routers; null means that of matrix_rule.
        muon_lr: rate of all groups under Muon.
        adamw_lr: rate of vectors and scalars, and of matrices, experts and routers under AdamW.
        embedding_lr: rate of the embedding (AdamW).
        head_lr: rate of the output head, tied to the embedding or not (AdamW).
        reference_hidden_size: width for which embedding_lr and head_lr are meant. They are multiplied by
            (hidden_size / reference_hidden_size) ** -0.5; null leaves them as they are.
        muon_momentum: momentum of Muon (Nesterov).
        muon_dtype: dtype of Muon's orthogonalisation. With ``float32``, splits of one batch over ranks and accumulation
            steps train alike. ``bfloat16`` is cheaper where it is native. Null follows the run: float32 under
            ``precision: 32-true`` (or 64-true), else the cheapest dtype of the device.
        adamw_betas: decay of AdamW's first and second moments.
        adamw_eps: term added to the root of AdamW's second moment. It is small because rare tokens have tiny gradients.
        weight_decay: decoupled decay of matrices, experts and routers; nothing else is decayed.
    """

    matrix_rule: Rule = "muon"
    router_rule: Rule | None = None
    muon_lr: float = 0.02
    adamw_lr: float = 3e-3
    embedding_lr: float = 0.2
    head_lr: float = 0.004
    reference_hidden_size: int | None = 768
    muon_momentum: float = 0.95
    muon_dtype: Literal["float32", "bfloat16"] | None = None
    adamw_betas: tuple[float, float] = (0.9, 0.95)
    adamw_eps: float = 1e-10
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for key, rules in (("matrix_rule", get_args(Rule)), ("router_rule", (*get_args(Rule), None))):
            if getattr(self, key) not in rules:
                raise UserError(f"optimizer.{key} is {getattr(self, key)!r}; must be one of {list(rules)}")
        if self.muon_dtype not in ("float32", "bfloat16", None):
            raise UserError(f"optimizer.muon_dtype is {self.muon_dtype!r}; must be 'float32', 'bfloat16' or null")
        for key in ("muon_lr", "adamw_lr", "embedding_lr", "head_lr", "weight_decay"):
            if not getattr(self, key) >= 0:
                raise UserError(f"optimizer.{key} is {getattr(self, key)}; must be >= 0")
        for key, decays in (("muon_momentum", (self.muon_momentum,)), ("adamw_betas", self.adamw_betas)):
            if not all(0 <= decay < 1 for decay in decays):
                raise UserError(f"optimizer.{key} is {getattr(self, key)}; must be at least 0 and below 1")
        if not self.adamw_eps > 0:
            raise UserError(f"optimizer.adamw_eps is {self.adamw_eps}; must be above 0")
        if self.reference_hidden_size is not None and self.reference_hidden_size < 1:
            raise UserError(f"optimizer.reference_hidden_size is {self.reference_hidden_size}; must be >= 1 or null")


def parameter_role(name: str, parameter: nn.Parameter, owner: nn.Module) -> str:
    """Return the role of one parameter, one of ``ROLES``.

    Args:
        name: full name in the module tree, for instance ``blocks.3.moe.router.weight``.
        parameter: the parameter.
        owner: the module that holds it.
    """
    place = name.split(".")[-2] if "." in name else ""
    if parameter.ndim < 2 or parameter.ndim > 3 or isinstance(owner, _ConvNd):
        return "other"  # vectors, scalars, convolution kernels
    if place in HEAD_NAMES:
        return "head"
    if isinstance(owner, nn.Embedding):
        return "embedding"
    if place in ROUTER_NAMES:
        return "router"
    return "experts" if parameter.ndim == 3 else "matrices"


def build_optimizer(
    module: nn.Module,
    config: OptimizerConfig,
    muon_dtype: torch.dtype | None = None,
    routers: Collection[nn.Parameter] = (),
) -> MuonAdamW:
    """Put each trainable parameter of ``module`` in exactly one group and build the optimizer.

    Groups are named by role (``name`` in each group), and empty ones are left out. A matrix is read as [out, in]
    (``nn.Linear``), a stack as [num_experts, in, out]. Frozen parameters (``requires_grad=False``) belong to no group.

    Args:
        module: module that is trained.
        config: rules and rates.
        muon_dtype: dtype of Muon's orthogonalisation if the config leaves it open; `None` means the cheapest of the
            device.
        routers: matrices of routers beside those that are named so, as in a released model.

    Raises:
        UserError: ``module`` has nothing to train.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    if not names:
        raise UserError(f"{type(module).__name__} has no trainable parameters; the optimizer needs at least one")

    members: dict[str, list[nn.Parameter]] = {role: [] for role in ROLES}
    for parameter, places in names.items():
        roles = {parameter_role(name, parameter, module.get_submodule(name.rpartition(".")[0])) for name in places}
        if parameter in routers and "matrices" in roles:
            roles = {"router"}
        members[min(roles, key=ROLES.index)].append(parameter)

    widths = [parameter.shape[-1] for role in ("embedding", "head") for parameter in members[role]]
    width_factor = 1.0
    if widths and config.reference_hidden_size is not None:
        width_factor = (max(widths) / config.reference_hidden_size) ** -0.5
    groups = [
        {"name": role, "params": parameters, **_group_settings(role, config, width_factor)}
        for role, parameters in members.items()
        if parameters
    ]
    check_groups(module, groups)
    return MuonAdamW(groups, muon_dtype if config.muon_dtype is None else getattr(torch, config.muon_dtype))


def check_groups(module: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Check that every trainable parameter of ``module`` is in exactly one group, once, and nothing else is.

    Raises:
        UserError: a parameter is in no group or in several, or a group has a frozen or foreign one; names them.
    """
    counts: dict[nn.Parameter, int] = {}
    for group in groups:
        for parameter in group["params"]:
            counts[parameter] = counts.get(parameter, 0) + 1
    trainable = {parameter: name for name, parameter in module.named_parameters() if parameter.requires_grad}
    problems = {
        "in no group": [name for parameter, name in trainable.items() if parameter not in counts],
        "in several groups": [name for parameter, name in trainable.items() if counts.get(parameter, 0) > 1],
        "frozen or not of this module": [tuple(parameter.shape) for parameter in counts if parameter not in trainable],
    }
    found = "; ".join(f"{problem}: {parameters}" for problem, parameters in problems.items() if parameters)
    if found:
        raise UserError(f"each trainable parameter must be in exactly one optimizer group; {found}")


def _group_settings(role: str, config: OptimizerConfig, width_factor: float) -> dict[str, Any]:
    block_rule = (config.router_rule or config.matrix_rule) if role == "router" else config.matrix_rule
    in_block = role in ("router", "experts", "matrices")
    if in_block and block_rule == "muon":
        return {
            "rule": "muon",
            "lr": config.muon_lr,
            "momentum": config.muon_momentum,
            "weight_decay": config.weight_decay,
            "output_dim": -1 if role == "experts" else -2,
        }
    rates = {"embedding": config.embedding_lr * width_factor, "head": config.head_lr * width_factor}
    return {
        "rule": "adamw",
        "lr": rates.get(role, config.adamw_lr),
        "betas": tuple(config.adamw_betas),
        "eps": config.adamw_eps,
        "weight_decay": config.weight_decay if in_block else 0.0,
    }
