"""The tokenizer of a released model, as the tokenizer of our own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_moe.data import Tokenizer
from lightning_moe.data.tokenizer import END_OF_TEXT
from lightning_moe.errors import UserError

SMALLEST = 16  # tokens: fewer are no vocabulary


def model_tokenizer(name: str, vocab_size: int | None = None, option: str = "--model") -> Tokenizer:
    """Load the tokenizer of a model of the transformers library.

    A document begins with the model's ``bos_token``; without one, with ``<|endoftext|>`` if it knows that, else with
    its ``eos_token``.

    Args:
        name: folder or name of the model, or of another tokenizer for it, or a ``tokenizer.json``.
        vocab_size: number of tokens that the model knows; `None` if it is not known.
        option: option that named it, for messages.

    Raises:
        UserError: there is no tokenizer of the `tokenizers` library, or it has ids that the model does not know.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        is_file = Path(name).is_file()
        found = PreTrainedTokenizerFast(tokenizer_file=name) if is_file else AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of many kinds, by what is wrong
        raise UserError(
            f"{option} {name}: no tokenizer can be read there: {' '.join(str(error).split())[:300]}"
        ) from None
    backend = getattr(found, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{option} {name}: {type(found).__name__} is no tokenizer of the `tokenizers` library.")
    if backend.get_vocab_size() < SMALLEST:  # what transformers makes of a folder without its files
        raise UserError(f"{option} {name}: no tokenizer can be read there: its files are missing.")
    known = backend.token_to_id(END_OF_TEXT) is not None
    start = found.bos_token or (END_OF_TEXT if known else found.eos_token or _usual_start(backend))
    if start is None:
        raise UserError(
            f"{option} {name}: its tokenizer has neither bos_token nor eos_token, so no document can begin."
        )
    # again from its text: the model's own object stays as it is
    tokenizer = Tokenizer(type(backend).from_str(backend.to_str()), str(name), str(start))
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{option} {name}: its tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model knows "
            f"{vocab_size} tokens: it does not belong to this model."
        )
    return tokenizer


def _usual_start(backend: Any) -> str | None:
    """Return the token with which documents usually begin, for a file that does not say it."""
    return next((token for token in ("<s>", "<bos>", "[CLS]") if backend.token_to_id(token) is not None), None)
