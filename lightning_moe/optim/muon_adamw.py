"""Muon and AdamW as one optimizer.

It is one object with a rule per parameter group, so that everything that expects *the* optimizer (automatic
optimization, accumulation, clipping, learning-rate schedulers, checkpoints) works unchanged (decision 18).

Cost of one step, measured on CPU (AVX512-BF16, one thread) for the tiny model: 10.0 M parameters, 16 + 1 experts of 192
x 384 in 3 of 4 layers. Forward and backward pass of 4096 tokens 1593 ms; AdamW for everything 6 ms fused (torch's
default loop 20, foreach 22); Muon for the matrices 247 ms with Newton–Schulz in bfloat16, 524 in float32. So Muon adds
15 % to a training step. It is bound by its matrix products: 40 GFLOP. Batching the 2-D matrices of one shape saves 5 %
of Muon's time on one thread and 12 % on two; a stack of experts is already a batch.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from lightning_moe.errors import UserError
from lightning_moe.optim.newton_schulz import orthogonalize_together

_DEFAULTS: dict[str, dict[str, Any]] = {
    "muon": {"momentum": 0.95, "weight_decay": 0.0},
    # torch looks up `fused` when it loads state: it keeps the step counters on the parameters' device.
    "adamw": {"betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0, "fused": True},
}


# Numbers of elements that are orthogonalised together. The first takes the 14 stacks of up-projections of a d12 model
# (768 x 1536) at once, and 2.7 GB beside it in bfloat16, when no activations exist. A CPU has no launches to save.
_LARGEST_BATCH, _LARGEST_BATCH_CPU = 2**28, 2**22

_STATES = {"muon": ("momentum_buffer",), "adamw": ("step", "exp_avg", "exp_avg_sq")}


class MuonAdamW(Optimizer):
    """An optimizer that applies Muon to matrices and AdamW to everything else.

    ``rule: "muon"``: Nesterov momentum, orthogonalised per matrix (5 Newton–Schulz steps), scaled by
    ``max(1, d_out / d_in) ** 0.5``. Parameters are one matrix [rows, columns] or a stack [num_experts, rows, columns],
    whose matrices are treated one by one. Group keys: ``lr``; ``output_dim`` (required), the dimension that holds the
    layer's outputs: -2 for ``nn.Linear`` weights [out, in], -1 for experts stored as [num_experts, in, out];
    ``momentum`` (0.95); ``weight_decay`` (0.0, decoupled, times the unscaled ``lr``).
    State: ``momentum_buffer``, like the parameter.

    An expert whose gradient is zero keeps moving in the direction of its momentum at full speed: orthogonalisation
    hides how small a matrix is, until its norm falls below 1e-7.

    ``rule: "adamw"``: ``torch.optim.AdamW`` (fused). Group keys: ``lr``, ``betas`` (0.9, 0.95), ``eps`` (1e-10),
    ``weight_decay`` (0.0, decoupled). State: ``step`` (float32 scalar), ``exp_avg``, ``exp_avg_sq``.

    Parameters without a gradient are skipped, as if they did not exist in this step.

    Args:
        param_groups: dicts with ``params``, ``rule``, ``lr``, the keys above, and any others (for instance ``name``).
        muon_dtype: dtype of the orthogonalisation; `None` means the cheapest of the device
            (`newton_schulz.cheapest_dtype`).

    Raises:
        UserError: a group lacks a key, has an unknown rule, or has parameters of a shape that does not fit its rule.
    """

    def __init__(self, param_groups: Iterable[dict[str, Any]], muon_dtype: torch.dtype | None = None) -> None:
        super().__init__(param_groups, defaults={})
        self.muon_dtype = muon_dtype

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        rule = param_group.get("rule")
        if rule not in _DEFAULTS:
            raise UserError(f"parameter group: rule is {rule!r}; must be one of {sorted(_DEFAULTS)}")
        if not param_group.get("lr", -1) >= 0:
            raise UserError(f"parameter group of rule {rule}: lr is {param_group.get('lr')}; must be a number >= 0")
        super().add_param_group({**_DEFAULTS[rule], **param_group})
        if rule == "muon":
            _check_muon_group(self.param_groups[-1])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as ``torch.optim.Optimizer.load_state_dict`` does; the groups' names and rules must be the same.

        Raises:
            UserError: the state was saved with other groups (torch alone would silently take the saved rules).
        """
        ours, saved = (
            [(group.get("name"), group.get("rule"), len(group["params"])) for group in groups]
            for groups in (self.param_groups, state_dict["param_groups"])
        )
        if ours != saved:
            raise UserError(
                "optimizer_states of the checkpoint do not fit: their groups (name, rule, parameters) are "
                f"{saved}, this run's are {ours}; resume with the optimizer settings of the saved run"
            )
        self._check_states(state_dict)
        super().load_state_dict(state_dict)

    def _check_states(self, state_dict: dict[str, Any]) -> None:
        """Refuse a state that is not that of its parameter; torch takes it, and fails in the next step."""
        numbers = {number for saved in state_dict["param_groups"] for number in saved["params"]}
        for number in state_dict["state"]:
            if number not in numbers:
                raise UserError(f"optimizer state of parameter {number}: no group has that parameter")
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            kind = group["rule"]
            for parameter, number in zip(group["params"], saved["params"], strict=True):
                state = state_dict["state"].get(number, {})
                if state and sorted(state) != sorted(_STATES[kind]):
                    raise UserError(
                        f"optimizer state of parameter {number}: has {', '.join(map(repr, state))}; "
                        f"must have {', '.join(map(repr, _STATES[kind]))}"
                    )
                for name, value in state.items():
                    shape = torch.Size() if name == "step" else parameter.shape
                    if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
                        found = f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)
                        raise UserError(
                            f"optimizer state of parameter {number}: {name} is {found}; "
                            f"must be a floating-point tensor of shape {list(shape)}"
                        )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; ``closure`` (optional) recomputes the loss, with gradients, and returns it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["rule"] == "muon":
                for batch in _batches(params):
                    self._muon(group, batch)
            elif params:
                self._adamw(group, params)
        return loss

    def _muon(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Apply Muon to matrices, or stacks of them, that `_batches` puts together."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        weights, grads = _local(params), _local(_grads(params))
        buffers = _local([self.state[p]["momentum_buffer"] for p in params])
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov: look one step ahead
        directions = _orthogonalized(params, list(updates), self.muon_dtype)
        output_dim = group["output_dim"]
        d_out, d_in = params[0].shape[output_dim], params[0].shape[-3 - output_dim]
        scale = max(1.0, d_out / d_in) ** 0.5
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, directions, alpha=-group["lr"] * scale)

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p].update(
                    step=torch.zeros((), dtype=torch.float32, device=p.device),
                    exp_avg=torch.zeros_like(p),
                    exp_avg_sq=torch.zeros_like(p),
                )
        states = [self.state[p] for p in params]
        adamw(
            _local(params),
            _local(_grads(params)),
            _local([state["exp_avg"] for state in states]),
            _local([state["exp_avg_sq"] for state in states]),
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _orthogonalized(params: list[Tensor], updates: list[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """Return this rank's parts of the updates, with each matrix orthogonalised.

    A rank that has whole matrices of a stack needs no others. The rows of a matrix are gathered once, and every rank
    does the work. A distributed tensor alone would gather in each product, and it refuses fewer rows than ranks
    (decision 28).

    Args:
        params: parameters of one shape and, if they are distributed, of one layout.
        updates: this rank's part of each one's update.
        dtype: dtype of the iteration.
    """
    first = params[0]
    if not isinstance(first, DTensor) or _has_whole_matrices(first):
        found = orthogonalize_together(_as_stacks(updates), dtype)
        return [direction.view_as(update) for direction, update in zip(found, updates, strict=True)]
    mesh, placements, shape, stride = first.device_mesh, first.placements, first.shape, first.stride()
    whole = [
        DTensor.from_local(update, mesh, placements, shape=shape, stride=stride).full_tensor() for update in updates
    ]
    found = orthogonalize_together(_as_stacks(whole), dtype)
    return _local([distribute_tensor(one.view(shape), mesh, placements, src_data_rank=None) for one in found])


def _as_stacks(matrices: list[Tensor]) -> list[Tensor]:
    return [one.unsqueeze(0) if one.ndim == 2 else one for one in matrices]


def _has_whole_matrices(stack: DTensor) -> bool:
    return stack.ndim == 3 and all(getattr(placement, "dim", None) == 0 for placement in stack.placements)


def _local(tensors: list[Tensor]) -> list[Tensor]:
    """Return this rank's parts of distributed tensors; others as they are.

    What works on each element alone needs no more, and whether torch can distribute an operation differs between its
    versions.
    """
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def _grads(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def _check_muon_group(group: dict[str, Any]) -> None:
    if group.get("output_dim") not in (-2, -1):
        raise UserError(
            f"muon parameter group: output_dim is {group.get('output_dim')}; must be -2 ([..., out, in], as "
            "nn.Linear) or -1 ([..., in, out])"
        )
    shapes = [tuple(p.shape) for p in group["params"] if p.ndim not in (2, 3)]
    if shapes:
        raise UserError(
            f"muon parameter group: parameters of shape {shapes}; Muon takes matrices [rows, columns] and stacks of "
            "them [num_experts, rows, columns]: give the others rule adamw"
        )


def _batches(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Group matrices of one shape, and stacks of them, up to a bound: fewer, larger products."""
    groups: dict[Any, list[Tensor]] = {}
    for p in params:
        layout = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
        groups.setdefault((p.shape, p.dtype, p.device, layout), []).append(p)
    for group in groups.values():
        largest = _LARGEST_BATCH_CPU if group[0].device.type == "cpu" else _LARGEST_BATCH
        size = max(1, largest // max(1, group[0].numel()))
        yield from (group[start : start + size] for start in range(0, len(group), size))
