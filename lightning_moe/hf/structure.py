"""Finding the routers and experts of a released model, and the formulas by which they choose and weigh.

Nothing is known by the name of a family. A pass over random tokens is watched: a *router* returns logits, weights and
indices of experts, and its *experts* are the module that is then called with these indices. The formulas are those
that reproduce what the routers returned in that pass. A model for which none does is refused.

Shape letters: N tokens, E experts, K experts per token.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moe.errors import UserError
from lightning_moe.hf.gating import GateScore, Gating
from lightning_moe.hf.released import ReleasedTopK

PROBE_TOKENS = 64
#: relative error of gates up to which a formula is the model's own, by the dtype of the model
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float64: 1e-4}
WANTED = "a router that returns logits, weights and indices of experts, and experts that take the latter two"


@dataclass(frozen=True)
class Routed:
    """What a router returned for the tokens of a pass.

    Args:
        logits: router logits, fp32 [N, E].
        weights: weights of the chosen experts, fp32 [N, K].
        indices: chosen experts, int64 [N, K].
    """

    logits: Tensor
    weights: Tensor
    indices: Tensor

    @property
    def mask(self) -> Tensor:
        """Chosen experts, bool [N, E]."""
        return torch.zeros_like(self.logits, dtype=torch.bool).scatter_(-1, self.indices, True)


@dataclass(frozen=True)
class Block:
    """One MoE layer of a released model.

    Args:
        path: path of the router in the model.
        router: module that returns (logits, weights, indices).
        experts: module that takes (hidden states [N, D], indices, weights).
        num_experts: number E of routed experts.
        top_k: number K of experts per token.
        rule: choice of the router.
        bias: selection bias of that choice, a tensor of the model [E]; `None` for none.
        gating: weights of the router.
    """

    path: str
    router: nn.Module
    experts: nn.Module
    num_experts: int
    top_k: int
    rule: ReleasedTopK
    bias: Tensor | None
    gating: Gating


def find_blocks(model: nn.Module, vocab_size: int, where: str) -> list[Block]:
    """Return the MoE layers of a model in the order of its forward pass.

    Args:
        model: a causal language model of the transformers library, in ``eval()``.
        vocab_size: number of its tokens.
        where: name of the model, for messages.

    Raises:
        UserError: the model is dense, or its structure or a formula is not known; the message says what was found.
    """
    name_of = {module: path for path, module in model.named_modules()}
    blocks = []
    for router, experts, routed in _watch(model, vocab_size):
        path, num_experts = name_of[router], routed.logits.shape[1]
        tolerance = TOLERANCES.get(next(model.parameters()).dtype, 2e-2)
        choice = _choice(router, name_of, model, routed, tolerance)
        gating = _gating(router, routed, tolerance)
        if choice is None or gating is None:
            what = "choice of experts" if choice is None else "weighting of the experts"
            raise UserError(
                f"--model {where}: {path} ({type(router).__name__}): its {what} is not known. Known are the top-k of a "
                "softmax or sigmoid, with or without bias and groups, and weights that are these scores, normalised or "
                "not, or those of SparseMixer."
            )
        blocks.append(Block(path, router, experts, num_experts, routed.indices.shape[1], *choice, gating))
    if not blocks:
        raise UserError(f"--model {where}: {_without_blocks(model)}")
    different = {block.num_experts for block in blocks}
    if len(different) > 1:
        raise UserError(
            f"--model {where}: its MoE layers have different numbers of experts ({sorted(different)}), which is not "
            "supported."
        )
    return blocks


def _without_blocks(model: nn.Module) -> str:
    kinds = dict.fromkeys(type(module).__name__ for module in model.modules())
    found = [kind for kind in kinds if re.search(r"moe|expert|router|gating|dbrx.*ffn", kind, re.IGNORECASE)]
    found = [kind for kind in found if kind != type(model).__name__ and not kind.endswith(("Model", "Layer"))]
    if not found:
        return f"{type(model).__name__} is a dense model: it has no routers."
    return f"the structure of {type(model).__name__} is not known. Found: {', '.join(found[:6])}. Wanted: {WANTED}."


def _watch(model: nn.Module, vocab_size: int) -> list[tuple[nn.Module, nn.Module, Routed]]:
    """Return routers, experts and what the routers returned in a pass over random tokens."""
    routed: dict[int, tuple[nn.Module, Any]] = {}  # by the identity of the indices
    found: list[tuple[nn.Module, nn.Module, Routed]] = []

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if not (isinstance(output, tuple) and len(output) == 3 and all(isinstance(one, Tensor) for one in output)):
            return
        logits, weights, indices = output
        fits = logits.dim() == weights.dim() == 2 and weights.shape == indices.shape and len(logits) == len(indices)
        if fits and logits.is_floating_point() and not indices.is_floating_point():
            routed[id(indices)] = module, output

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and id(value) in routed:
                router, (logits, weights, indices) = routed.pop(id(value))
                result = Routed(logits.float().detach(), weights.float().detach(), indices.detach().long())
                found.append((router, module, result))

    handles = [module.register_forward_hook(after) for module in model.modules()]
    handles += [module.register_forward_pre_hook(before, with_kwargs=True) for module in model.modules()]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab_size, (2, PROBE_TOKENS // 2), generator=generator)
    try:
        with torch.no_grad():
            model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _choice(
    router: nn.Module, name_of: dict[nn.Module, str], model: nn.Module, routed: Routed, tolerance: float
) -> tuple[ReleasedTopK, Tensor | None] | None:
    """Return the rule and the bias that choose as the router did; the first, if several do."""
    num_experts = routed.logits.shape[1]
    parent = model.get_submodule(name_of[router].rpartition(".")[0])
    for rule, bias in itertools.product(_rules(router, num_experts), [None, *_vectors(router, parent, num_experts)]):
        scores = rule.choice_scores(routed.logits, torch.zeros(()) if bias is None else bias.float())
        best = scores.topk(routed.indices.shape[1], dim=-1)
        least = best.values[:, -1:]
        unlike = routed.mask & (scores < least - tolerance * least.abs())  # equal scores may be chosen either way
        if not unlike.any() and scores.gather(-1, routed.indices).isfinite().all():
            return rule, bias
    return None


def _rules(router: nn.Module, num_experts: int) -> Iterator[ReleasedTopK]:
    groups = next((int(getattr(router, name)) for name in ("num_group", "n_group") if getattr(router, name, None)), 1)
    kept = int(getattr(router, "topk_group", None) or 1)
    if kept < groups and num_experts % groups == 0 and getattr(router, "topk_method", None) != "greedy":
        # first: the limit may not have shown in the pass, and counts for other numbers of experts
        yield ReleasedTopK("softmax", groups, kept, "max")
        yield ReleasedTopK("sigmoid", groups, kept, "top2")
        yield ReleasedTopK("softmax", groups, kept, "top2")
        yield ReleasedTopK("sigmoid", groups, kept, "max")
    yield ReleasedTopK("softmax")
    yield ReleasedTopK("sigmoid")


def _vectors(router: nn.Module, parent: nn.Module, num_experts: int) -> Iterator[Tensor]:
    """Yield the tensors of one number per expert in a router, its children and its parent."""
    seen = set()
    for owner, recurse in ((router, True), (parent, False)):
        for tensor in itertools.chain(owner.buffers(recurse=recurse), owner.parameters(recurse=recurse)):
            if tensor.numel() == num_experts and tensor.is_floating_point() and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor.detach().flatten()


def _gating(router: nn.Module, routed: Routed, tolerance: float) -> Gating | None:
    """Return the formula whose gates are the router's, up to one factor, with that factor; `None` if none is."""
    jitter = float(getattr(router, "router_jitter_noise", 0) or 0)
    scores: list[tuple[GateScore, bool]] = [("softmax", False), ("softmax", True), ("sigmoid", False)]
    candidates = [*scores, ("sigmoid", True)] + ([("sparsemixer", False)] if jitter else [])
    errors: dict[Gating, float] = {}
    for score, normalize in candidates:
        gating = Gating(score, normalize, 1.0, jitter if score == "sparsemixer" else 0.0)
        ratio = routed.weights / gating.gates(routed.logits, routed.mask).gather(-1, routed.indices).clamp_min(1e-30)
        scale = float(ratio.median())
        if scale <= 0 or not ratio.isfinite().all():
            continue
        known = [1.0, *(float(v) for name, v in vars(router).items() if "scal" in name and isinstance(v, int | float))]
        exact = next((value for value in known if abs(value / scale - 1) < tolerance), scale)
        found = Gating(gating.score, normalize, exact, gating.jitter)
        errors[found] = float((ratio / exact - 1).abs().max())
    best = min(errors, key=errors.__getitem__, default=None)
    return best if best is not None and errors[best] <= tolerance else None
