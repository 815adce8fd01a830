"""Callbacks that pass on to the logger what it needs of training."""

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_moe.callbacks.load_balance import LoadBalance
from lightning_moe.model.moe_layers import named_moe_layers
from lightning_moe.tracking.figures import load_figure
from lightning_moe.tracking.logger import MLflowLogger


class RewindMetrics(Callback):
    """Drops, when training starts from a checkpoint, what was recorded after that checkpoint's step.

    So the record of a run that was stopped and resumed equals that of an unbroken run. It needs nothing of the module.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MLflowLogger):
                logger.rewind(trainer.global_step)


class LogLoadFigure(Callback):
    """Draws the load per layer and expert after every validation, as ``figures/load.png`` of the run (the newest one).

    The numbers are those of the `LoadBalance` callback beside it.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        balances = [callback for callback in trainer.callbacks if isinstance(callback, LoadBalance)]  # type: ignore[attr-defined]
        load = balances[0].evaluation_load if balances else None
        if load is None or trainer.sanity_checking or not trainer.is_global_zero:
            return
        layers = [name.removeprefix("layer_").lstrip("0") or "0" for name in named_moe_layers(pl_module)]
        title = f"Load in validation after {trainer.global_step} steps"
        for logger in trainer.loggers:
            if isinstance(logger, MLflowLogger):
                logger.log_figure(load_figure(load, layers, title), "load")
