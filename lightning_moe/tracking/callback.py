"""Lightning's part in resuming a record."""

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_moe.tracking.logger import MLflowLogger


class RewindMetrics(Callback):
    """When training starts from a checkpoint, drops what was recorded after that checkpoint's step.

    So the record of a run that was stopped and resumed ends as that of one that was not. Needs nothing from the module.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MLflowLogger):
                logger.rewind(trainer.global_step)
