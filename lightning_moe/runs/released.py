"""A released model with its tokenizer, and text for it, for the commands that take ``--model``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from lightning_moe.data import StandardLibrary, TextDataModule, Tokenizer
from lightning_moe.data.tokenizer import TokenizerConfig
from lightning_moe.hf import TransformersLM


@dataclass(frozen=True)
class Released:
    """A released model.

    Args:
        lm: the model, with thresholds if it was named by a folder that holds some.
        name: name or folder of the model itself.
        tokenizer: its tokenizer, or the one that was given instead.
    """

    lm: TransformersLM
    name: str
    tokenizer: Tokenizer


def open_released(name: str, options: argparse.Namespace, max_sequence_length: int | None = None) -> Released:
    """Load a model and its tokenizer by the options of a command: ``dtype``, ``device``, ``tokenizer``, …

    Args:
        name: value of ``--model``.
        options: options of the command, see `cli.arguments.add_checkpoint_or_model`.
        max_sequence_length: bound on the tokens of context; `None` for the model's own.

    Raises:
        UserError: the model or the tokenizer cannot be used.
    """
    import torch

    from lightning_moe.hf import open_model
    from lightning_moe.hf.tokenizer import model_tokenizer

    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    lm, own = open_model(name, dtype, options.device, max_sequence_length, options.trust_remote_code)
    option = "--model" if options.tokenizer is None else "--tokenizer"
    return Released(lm, own, model_tokenizer(options.tokenizer or own, lm.vocab_size, option))


def default_text(tokenizer: Tokenizer, sequence_length: int) -> TextDataModule:
    """Encode the default corpus for a model, once, and open it: text for commands that were given none.

    Args:
        tokenizer: tokenizer of the model.
        sequence_length: number of tokens of a window.
    """
    config = TokenizerConfig(vocab_size=tokenizer.vocab_size)
    data = TextDataModule(StandardLibrary(), config, sequence_length=sequence_length)
    data.adopt_tokenizer(tokenizer.to_text())
    data.prepare_data()
    data.setup("validate")
    return data
