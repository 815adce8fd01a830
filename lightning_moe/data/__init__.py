"""Corpora, tokenizer, token store and the DataModule."""

from lightning_moe.data.corpora import Corpus, Document, SitePackages, StandardLibrary
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.data.hub_dataset import HubDataset
from lightning_moe.data.local_files import LocalFiles
from lightning_moe.data.tokenizer import Tokenizer, TokenizerConfig

__all__ = [
    "Corpus",
    "Document",
    "HubDataset",
    "LocalFiles",
    "SitePackages",
    "StandardLibrary",
    "TextDataModule",
    "Tokenizer",
    "TokenizerConfig",
]
