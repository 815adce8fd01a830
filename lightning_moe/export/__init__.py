"""A checkpoint as a folder that `transformers` loads; `checkpoints.read_checkpoint` is the way back."""

from lightning_moe.export.folder import export_folder

__all__ = ["export_folder"]
