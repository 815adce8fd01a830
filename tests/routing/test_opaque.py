"""Selections are opaque operations in compiled graphs, with the results of the functions themselves."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.gloo_pair import GlooPair
from torch import Tensor, fx

from lightning_moe.routing import (
    ExpertChoice,
    ExpertThreshold,
    Phase,
    QuantileBalancing,
    RoutingRule,
    TokenChoice,
    TokenChoiceLossFree,
)
from lightning_moe.routing.base import RoutingState

SCANS = ("sort", "topk", "cumsum", "scatter", "searchsorted", "nonzero", "cummax")


def select_compiled(rule: RoutingRule, phase: Phase, logits: Tensor) -> tuple[Tensor, Tensor, list[str]]:
    """The mask without and with compilation, and the names of the graph's operations."""
    names: list[str] = []

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    state = RoutingState(rule, logits.shape[-1], 2)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: rule.select(x, state, phase).mask, backend=backend, fullgraph=True)
    return rule.select(logits, state, phase).mask, compiled(logits), names


@pytest.mark.parametrize("phase", Phase, ids=str)
@pytest.mark.parametrize(
    "rule",
    [ExpertThreshold(), ExpertChoice(pool="sequence"), TokenChoice(), TokenChoiceLossFree(), QuantileBalancing()],
    ids=lambda rule: type(rule).__name__,
)
def test_no_scan_and_no_sort_is_in_a_graph(rule: RoutingRule, phase: Phase) -> None:
    logits = torch.randn(3, 16, 8).round(decimals=1)  # with equal scores
    expected, mask, names = select_compiled(rule, phase, logits)
    assert torch.equal(mask, expected)
    assert names
    assert not [name for name in names if "lightning_moe" not in name and any(scan in name for scan in SCANS)]


@pytest.mark.parametrize("shape", [(24, 8), (3, 8, 4)])
def test_the_compiler_is_told_the_right_shapes_and_strides(shape: tuple[int, ...]) -> None:
    scores, counts = torch.randn(shape), torch.randint(0, 5, (*shape[:-2], shape[-1]))
    operations = torch.ops.lightning_moe
    torch.library.opcheck(operations.top_count_mask.default, (scores, counts, 5))
    torch.library.opcheck(operations.top_count_mask.default, (scores, None, 5))
    torch.library.opcheck(operations.top_experts_mask.default, (scores, 3))
    torch.library.opcheck(operations.top_experts_mask.default, (scores.mT, 3))


def choose_over_ranks(rank: int) -> tuple[bool, int, list[str]]:
    torch.manual_seed(rank)
    logits = torch.randn(1 + rank, 16, 8).round(decimals=1)
    expected, mask, names = select_compiled(ExpertChoice(pool="global"), Phase.TRAIN, logits)
    chosen = mask.sum()
    dist.all_reduce(chosen)
    return torch.equal(mask, expected), int(chosen), names


def test_a_pool_over_ranks_is_one_operation(gloo_pair: GlooPair) -> None:
    for equal, chosen, names in gloo_pair.run(choose_over_ranks, [(0,), (1,)]):
        assert equal
        assert chosen == 3 * 16 * 2
        assert any("mask_over_ranks" in name for name in names)
        assert not [name for name in names if "all_reduce" in name or "cumsum" in name]
