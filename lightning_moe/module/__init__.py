"""The LightningModule of every run."""

from lightning_moe.module.language_model import Batch, LanguageModel

__all__ = ["Batch", "LanguageModel"]
