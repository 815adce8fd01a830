"""Find what a command needs beside a checkpoint: the device, and tokenizer and text of the run that wrote it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser

from lightning_moe.checkpoints.exported import bundled_tokenizer
from lightning_moe.config.check import check_values
from lightning_moe.config.schema import Schema
from lightning_moe.data import TextDataModule, Tokenizer
from lightning_moe.errors import UserError
from lightning_moe.file_schema import read_text
from lightning_moe.filenames import CONFIG_FILE
from lightning_moe.module import LanguageModel
from lightning_moe.runs.config import parse_config
from lightning_moe.runs.folder import run_of_checkpoint
from lightning_moe.trust import check_stored_config


def to_device(model: LanguageModel, device: str) -> LanguageModel:
    """Move a model to the torch device that ``--device`` names.

    Raises:
        UserError: this machine has no such device.
    """
    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:  # the latter: torch was built without it
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None


def rule_name(checkpoint: dict[str, Any]) -> str:
    """Return the class name of a checkpoint's routing rule, or ``dense``."""
    routing = checkpoint["hyper_parameters"]["routing"]
    return "dense" if routing is None else str(routing["class_path"]).rpartition(".")[2]


def run_data(ckpt_path: Path, instead: str, tokenizer: Tokenizer | None = None) -> TextDataModule:
    """Build and prepare the data module of the run that wrote a checkpoint.

    Args:
        ckpt_path: path of the checkpoint.
        instead: options to give for a checkpoint outside of a run's folder, for the message.
        tokenizer: tokenizer of the checkpoint; by default what the configuration gives.

    Raises:
        UserError: there is no run around the checkpoint, or its configuration cannot be used.
    """
    folder = run_of_checkpoint(ckpt_path)
    if folder is None:
        raise UserError(
            f"ckpt_path={str(ckpt_path)!r}: not in a run's folder with a {CONFIG_FILE}, so its text is "
            f"not known: give {instead}."
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TextDataModule, "data")
    try:
        text = read_text(folder / CONFIG_FILE)
        config = parse_config(text, str(folder / CONFIG_FILE))
        check_stored_config(text, {"data": config["data"]}, folder)
        parsed = parser.parse_object({"data": config["data"]})
        check_values(Schema(parser).types, parsed, lambda _: CONFIG_FILE)
        data = parser.instantiate(parsed).data
    except (ArgumentError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split()).removeprefix(f"{folder / CONFIG_FILE}: ")
        raise UserError(f"{folder / CONFIG_FILE}: {reason}") from error
    assert isinstance(data, TextDataModule)
    try:
        if tokenizer is not None:
            data.adopt_tokenizer(tokenizer.to_text())
        data.prepare_data()
        data.setup("validate")
    except UserError as error:
        raise UserError(f"{folder / CONFIG_FILE}: {error}") from error
    return data


def text_source(
    ckpt_path: Path, checkpoint: Mapping[str, Any], tokenizer: str | None, has_text: bool
) -> tuple[Tokenizer, TextDataModule | None]:
    """Find the tokenizer for a text and, if it is the run's tokenizer, the data of the run.

    Args:
        ckpt_path: path of the checkpoint.
        checkpoint: content of the checkpoint.
        tokenizer: value of ``--tokenizer``.
        has_text: whether ``--text`` is given. The data of a run that was copied without its corpus are then left out.

    Raises:
        UserError: there is no tokenizer, it cannot be read, or there is no text for it.
    """
    file = tokenizer or bundled_tokenizer(ckpt_path)
    if file is not None:
        if not has_text:
            raise UserError(f"tokenizer {file}: it encodes --text; give that too.")
        return Tokenizer.load(file), None
    own = own_tokenizer(ckpt_path, checkpoint)
    try:
        data = run_data(ckpt_path, "--text" if own else "--text and --tokenizer", own)
    except UserError as error:
        if own is None or not has_text:
            raise
        print(f"the validation text of the run is left out: {error}", file=sys.stderr)
        return own, None
    return data.tokenizer, data


def tokenizer_of(ckpt_path: Path, checkpoint: Mapping[str, Any], given: str | None, instead: str) -> Tokenizer:
    """Load the tokenizer of a checkpoint: the given file, that of an export, the checkpoint's own, or the run's.

    Raises:
        UserError: there is no tokenizer, or it cannot be read.
    """
    file = given or bundled_tokenizer(ckpt_path)
    if file is not None:
        return Tokenizer.load(file)
    return own_tokenizer(ckpt_path, checkpoint) or run_data(ckpt_path, instead).tokenizer


def own_tokenizer(ckpt_path: Path, checkpoint: Mapping[str, Any]) -> Tokenizer | None:
    """Return the tokenizer that a checkpoint holds; `None` for one that holds none.

    Raises:
        UserError: it cannot be read, or is not the one whose fingerprint the checkpoint holds.
    """
    text, expected = tokenizer_text(checkpoint), tokenizer_fingerprint(checkpoint)
    if text is None:
        return None
    tokenizer = Tokenizer.from_text(text, f"the tokenizer in {ckpt_path}")
    if expected not in (None, tokenizer.fingerprint):
        raise UserError(
            f"{ckpt_path}: TextDataModule: holds the tokenizer {tokenizer.fingerprint}, but was trained with {expected}"
        )
    return tokenizer


def tokenizer_text(checkpoint: Mapping[str, Any]) -> str | None:
    """Return the content of the tokenizer's file that a checkpoint holds; `None` for one that holds none."""
    found = checkpoint.get("TextDataModule", {}).get("tokenizer")
    return None if found is None else str(found)


def check_tokenizer(tokenizer: Tokenizer, checkpoint: dict[str, Any], instead: str) -> None:
    """Refuse another tokenizer than the checkpoint's own: under it, text is noise to the model.

    Args:
        tokenizer: tokenizer that the text is encoded with.
        checkpoint: content of the checkpoint.
        instead: options that give the right one, for the message.

    Raises:
        UserError: the checkpoint was trained with another tokenizer.
    """
    expected = tokenizer_fingerprint(checkpoint) or tokenizer.fingerprint
    size = checkpoint["hyper_parameters"]["decoder"]["vocab_size"]
    released = checkpoint["hyper_parameters"].get("pretrained") is not None  # it may have rows without a token
    if tokenizer.fingerprint != expected or not (
        size == tokenizer.vocab_size or (released and size > tokenizer.vocab_size)
    ):
        raise UserError(
            f"the tokenizer (tokenizer.json) {tokenizer.fingerprint} ({tokenizer.vocab_size} tokens) is not the "
            f"checkpoint's, {expected} ({size} tokens): give that one with {instead}."
        )


def tokenizer_fingerprint(checkpoint: Mapping[str, Any]) -> str | None:
    """Return the fingerprint of the tokenizer that a checkpoint was trained with; `None` if it is not recorded."""
    found = checkpoint.get("TextDataModule", {}).get("data", {}).get("tokenizer")
    return None if found is None else str(found)
