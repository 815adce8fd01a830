"""The LightningModule of every run."""

from lightning_moe.module.language_model import LanguageModel

__all__ = ["LanguageModel"]
