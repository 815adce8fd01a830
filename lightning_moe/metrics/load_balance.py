"""How evenly the experts are used and how much compute tokens get."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_moe.routing.base import Selection


class LoadBalanceMetric(Metric):
    """The counts of one layer over any number of batches and ranks.

    ``compute`` returns ``load`` (int64 [E]) and fp32 scalars: ``max_load`` (load of the busiest expert / mean
    load), ``load_cv`` (coefficient of variation of the loads), ``dead_experts`` (experts without a token),
    ``fanout_mean`` (routed experts per token), ``fanout_0_share``, ``fanout_1_share``, ``fanout_2plus_share``
    (shares of tokens with so many experts), and, where a capacity acted, ``saturation_rate`` (share of the selected
    tokens that were dropped) and ``starvation_rate`` (share of the capacity's lower bound that the selection left
    unfilled).

    Args:
        num_experts: number E of experts.
    """

    full_state_update = False
    load: Tensor
    fanout_counts: Tensor
    dropped: Tensor
    added: Tensor
    guaranteed: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.add_state("load", torch.zeros(num_experts, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("fanout_counts", torch.zeros(num_experts + 1, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("dropped", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("added", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("guaranteed", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, selection: Selection, valid: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            selection: choice with mask [B, S, E].
            valid: bool [B, S], tokens that count; `None` for all.
        """
        mask = selection.mask if valid is None else selection.mask & valid.unsqueeze(-1)
        self.load += mask.sum((0, 1))
        fanout = mask.sum(-1) if valid is None else torch.where(valid, mask.sum(-1), self.num_experts + 1)
        counts = torch.zeros(self.num_experts + 2, dtype=torch.int64, device=mask.device)
        counts.scatter_add_(0, fanout.flatten(), torch.ones_like(fanout.flatten()))
        self.fanout_counts += counts[:-1]  # the last bin holds the tokens that do not count
        if selection.num_dropped is not None and selection.num_added is not None:
            self.dropped += selection.num_dropped.sum()
            self.added += selection.num_added.sum()
            self.guaranteed += selection.lower_bound * self.num_experts

    def compute(self) -> dict[str, Tensor]:
        load, fanout = self.load.double(), self.fanout_counts.double()
        mean = load.mean().clamp_min(1e-9)  # without a token the ratios are 0
        tokens = fanout.sum().clamp_min(1)
        values = {
            "max_load": load.max() / mean,
            "load_cv": load.std(correction=0) / mean,
            "dead_experts": (load == 0).sum(),
            "fanout_mean": load.sum() / tokens,
            "fanout_0_share": fanout[0] / tokens,
            "fanout_1_share": fanout[1] / tokens,
            "fanout_2plus_share": fanout[2:].sum() / tokens,
        }
        if self.guaranteed > 0 or self.dropped > 0:
            selected = load.sum() + self.dropped - self.added
            values["saturation_rate"] = self.dropped / selected.clamp_min(1)
            values["starvation_rate"] = self.added / self.guaranteed.clamp_min(1)
        return {"load": self.load} | {name: value.float() for name, value in values.items()}
