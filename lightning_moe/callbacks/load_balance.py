"""Logs how evenly the experts are used, in training and in every evaluation."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_moe.callbacks.clock import LoggingClock
from lightning_moe.errors import UserError
from lightning_moe.metrics.catalogue import CATALOGUE
from lightning_moe.metrics.load_balance import LoadBalanceMetric
from lightning_moe.model.moe_layers import named_moe_layers
from lightning_moe.model.routed_layer import RoutedLayer
from lightning_moe.ranks import sum_over_ranks
from lightning_moe.routing.base import Phase


class LoadBalance(pl.Callback):
    """Load per expert, fanout, dead experts, capacity rates, and how far the batch's cutoff is from the threshold.

    Training values are sums over the optimizer steps since the last logging (``routing/…``); evaluation values are
    over the whole set (``val_routing/…``, ``test_routing/…``). ``routing/<name>`` is one number for all layers
    (the worst layer's, the sum or the mean, as `metrics.catalogue` says); ``routing/layer_03/<name>`` is one layer's.
    The metrics are those of `LoadBalanceMetric`, and of training those of the optimizer step that is logged, over all
    its micro-batches and ranks: ``cutoff_deviation``, mean over experts of |cutoff of the global batch − threshold|;
    ``logit_std`` and ``gate_std``, standard deviations over tokens and experts; ``raw_fanout_mean``, the experts per
    token that the causal rule would choose with the state that the step began with (thresholds alone: no warm-up, no
    capacity).

    Args:
        per_layer: log each layer's values too.
        per_expert: log each expert's load relative to the mean, ``routing/layer_03/load/expert_07``.
    """

    def __init__(self, per_layer: bool = True, per_expert: bool = False) -> None:
        self.per_layer, self.per_expert = per_layer, per_expert
        #: fp64 [layers, E], loads of the last evaluation relative to the mean
        self.evaluation_load: Tensor | None = None
        self._metrics: dict[str, dict[str, LoadBalanceMetric]] = {}
        self._resumed: dict[str, dict[str, Tensor]] = {}  # counts of each layer, from a checkpoint
        self._router: dict[str, list[Tensor]] = {}  # `_router_sums` of a step's micro-batches
        self._clock = LoggingClock()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock.start(trainer)
        self._router = {}
        self._reset("train", pl_module)
        resumed, self._resumed = self._resumed, {}
        if trainer.is_global_zero:  # the counts are those of all ranks
            for name, counts in resumed.items():
                for key, value in counts.items():
                    setattr(self._metrics["train"][name], key, value.to(pl_module.device))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse counts of another model, before training begins."""
        self._reset("train", pl_module)
        metrics = self._metrics["train"]
        for name, counts in self._resumed.items():
            for key, value in counts.items():
                own = metrics[name].metric_state.get(key) if name in metrics else None
                if not isinstance(own, Tensor) or value.shape != own.shape or value.dtype != own.dtype:
                    raise UserError(
                        f"the checkpoint's callbacks.LoadBalance.{name}.{key}: is no count of this model's experts"
                    )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts since the last logging, of all ranks."""
        metrics = self._metrics.get("train", {})
        return {
            name: {key: sum_over_ranks(getattr(metric, key)).cpu() for key in metric.metric_state}
            for name, metric in metrics.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict

    @torch.no_grad()
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the routers before the step changes their state."""
        if self._clock.will_be_due(trainer):
            for name, layer in named_moe_layers(pl_module).items():
                if layer.record is not None:
                    self._router.setdefault(name, []).append(_router_sums(layer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._update("train", pl_module, None)
        if self._clock.is_due(trainer):
            self._log("train", "routing", trainer, pl_module)
            self._reset("train", pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reset("val", pl_module)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._update("val", pl_module, batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log("val", "test_routing" if trainer.testing else "val_routing", trainer, pl_module)

    # `test` is `validate` under another name
    on_test_start, on_test_batch_end = on_validation_start, on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def _reset(self, stage: str, pl_module: pl.LightningModule) -> None:
        self._metrics[stage] = {
            name: LoadBalanceMetric(layer.state.num_experts).to(pl_module.device)
            for name, layer in named_moe_layers(pl_module).items()
        }

    def _update(self, stage: str, pl_module: pl.LightningModule, batch: Any) -> None:
        valid = batch["labels"] != -100 if isinstance(batch, dict) and "labels" in batch else None
        layers = named_moe_layers(pl_module)
        for name, metric in self._metrics[stage].items():
            record = layers[name].record
            if record is not None:
                metric.update(record.selection, valid)

    def _log(self, stage: str, prefix: str, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layers = named_moe_layers(pl_module)
        values = {name: metric.compute() for name, metric in self._metrics[stage].items()}
        if not values:
            return
        # reshape: torchmetrics makes a single number of the loads of a single expert
        loads = torch.stack([layer_values.pop("load").double().reshape(-1) for layer_values in values.values()])
        relative = loads / loads.mean(-1, keepdim=True).clamp_min(1e-9)  # [layers, E]
        if stage == "train":
            parts, self._router = self._router, {}
            for name, layer_values in _router_statistics(layers, parts).items():
                values[name] |= layer_values
            for name, layer_values in values.items():
                state = layers[name].state
                if "cutoff" in state and "threshold" in state:
                    layer_values["cutoff_deviation"] = (state["cutoff"] - state["threshold"]).abs().mean()
        else:
            self.evaluation_load = relative.cpu()

        logged = {}
        for key in {key: None for layer_values in values.values() for key in layer_values}:
            over_layers = torch.stack([layer_values[key] for layer_values in values.values() if key in layer_values])
            logged[f"{prefix}/{key}"] = _reduce(over_layers, key)
        if self.per_layer:
            for name, layer_values in values.items():
                logged |= {f"{prefix}/{name}/{key}": value for key, value in layer_values.items()}
        if self.per_expert:
            for name, row in zip(values, relative, strict=True):
                logged |= {f"{prefix}/{name}/load/expert_{i:02d}": load.float() for i, load in enumerate(row)}
        pl_module.log_dict(logged)


def _router_sums(layer: RoutedLayer) -> Tensor:
    """Return what the last micro-batch adds to the statistics of a router, fp64 [6].

    The number of tokens; the sum and the sum of squares of the logits, and of the gates; the number of experts that the
    causal rule would choose.
    """
    assert layer.record is not None
    logits, gates = layer.record.logits, layer.gates(layer.record.logits, layer.record.selection.mask)
    moments = [power.sum() for x in (logits.double(), gates.double()) for power in (x, x.square())]
    chosen = layer.rule.select(logits, layer.state, Phase.CAUSAL).mask.sum().double()
    return torch.stack([torch.full_like(chosen, logits[..., 0].numel()), *moments, chosen])


def _router_statistics(layers: dict[str, RoutedLayer], parts: dict[str, list[Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Return the statistics of each layer over all micro-batches and ranks, from their `_router_sums`. Collective."""
    if not parts:
        return {}
    pooled = sum_over_ranks(torch.stack([torch.stack(sums).sum(0) for sums in parts.values()]))  # [layers, 6]
    values = {}
    for name, (tokens, logits, logit_squares, gates, gate_squares, chosen) in zip(parts, pooled, strict=True):
        count = tokens * layers[name].state.num_experts
        values[name] = {
            "logit_std": _std(count, logits, logit_squares),
            "gate_std": _std(count, gates, gate_squares),
            "raw_fanout_mean": (chosen / tokens).float(),
        }
    return values


def _std(count: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    """Return the standard deviation of ``count`` values, fp32, from their sum and that of their squares in fp64."""
    return (squares / count - (total / count).square()).clamp_min(0).sqrt().float()


def _reduce(values: Tensor, name: str) -> Tensor:
    """Reduce the layers' values of a metric to one number, as the catalogue says."""
    how = CATALOGUE[name].over_layers
    return values.max() if how == "max" else values.sum() if how == "sum" else values.mean()
