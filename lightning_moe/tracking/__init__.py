"""Experiment tracking: a run keeps its own record on disk, and a separate process brings MLflow up to date with it.

The names are resolved on first use: the uploading process imports this package and must start without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_moe.tracking.callback import LogLoadFigure as LogLoadFigure
    from lightning_moe.tracking.callback import RewindMetrics as RewindMetrics
    from lightning_moe.tracking.figures import load_figure as load_figure
    from lightning_moe.tracking.files import read_metrics as read_metrics
    from lightning_moe.tracking.logger import MLflowLogger as MLflowLogger
    from lightning_moe.tracking.recovery import upload as upload

_HOME = {
    "LogLoadFigure": "callback",
    "MLflowLogger": "logger",
    "RewindMetrics": "callback",
    "load_figure": "figures",
    "read_metrics": "files",
    "upload": "recovery",
}
__all__ = ["LogLoadFigure", "MLflowLogger", "RewindMetrics", "load_figure", "read_metrics", "upload"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
