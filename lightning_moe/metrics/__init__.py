"""torchmetrics metrics: sums over ranks are theirs, not ours."""

from lightning_moe.metrics.language_modeling import LanguageModelingMetric
from lightning_moe.metrics.load_balance import LoadBalanceMetric

__all__ = ["LanguageModelingMetric", "LoadBalanceMetric"]
