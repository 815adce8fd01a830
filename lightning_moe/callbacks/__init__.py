"""Lightning callbacks; each works on any LightningModule that contains `RoutedLayer` modules."""

from lightning_moe.callbacks.finite_guard import FiniteGuard
from lightning_moe.callbacks.load_balance import LoadBalance
from lightning_moe.callbacks.routing_state_update import RoutingStateUpdate
from lightning_moe.callbacks.threshold_warmup import ThresholdWarmup
from lightning_moe.callbacks.throughput import Throughput

__all__ = ["FiniteGuard", "LoadBalance", "RoutingStateUpdate", "ThresholdWarmup", "Throughput"]
