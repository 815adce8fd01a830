"""The text with which `calibrate --model` and `dial` calibrate and measure."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_moe.cli.arguments import read_text
from lightning_moe.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from lightning_moe.data.sharded_tokens import ShardedTokens
    from lightning_moe.runs.released import Released

LONGEST_WINDOW = 1024  # tokens, unless another length is asked for: attention over more takes long


@dataclass(frozen=True)
class ReleasedText:
    """Text for a released model.

    Args:
        source: where it is from, for reports.
        tokens: token ids to calibrate and measure on.
        validation: token ids of other text; `None` if the user's own file is all there is.
    """

    source: str
    tokens: np.ndarray | ShardedTokens
    validation: ShardedTokens | None


def text_for(options: argparse.Namespace, released: Released, sequence_length: int) -> ReleasedText:
    """Return the file of ``--text``, or the default corpus with its two splits, in the tokens of the model.

    Raises:
        UserError: the file cannot be read.
    """
    import numpy as np

    from lightning_moe.runs.released import default_text

    if options.text is not None:
        ids = [released.tokenizer.end_of_text_id, *released.tokenizer.encode(read_text("--text", options.text))]
        return ReleasedText(options.text, np.array(ids, dtype=np.int64), None)
    data = default_text(released.tokenizer, sequence_length)
    return ReleasedText(
        "the training split of the default corpus", data.store.tokens("train"), data.store.tokens("validation")
    )


def window_length(options: argparse.Namespace, released: Released) -> int:
    """Return ``--sequence_length``, or what suits the model.

    Raises:
        UserError: it is more than the model's context.
    """
    context = released.lm.max_sequence_length
    length: int = options.sequence_length or min(context, LONGEST_WINDOW)
    if length > context:
        raise UserError(f"--sequence_length {length}: the model's context is {context}.")
    return length


def refuse_inside(output_dir: Path, model: str) -> None:
    """Refuse to write into the folder of a model.

    Raises:
        UserError: the output would be inside of it.
    """
    folder = Path(model).expanduser().resolve()
    if folder.is_dir() and output_dir.resolve().is_relative_to(folder):
        raise UserError(f"--output_dir {output_dir}: is inside the model's folder, in which nothing is ever written.")
