"""A checkpoint as a folder that `transformers` loads, and back."""

from lightning_moe.export.folder import export_folder, import_folder

__all__ = ["export_folder", "import_folder"]
