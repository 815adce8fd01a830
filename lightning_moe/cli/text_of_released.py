"""The text that commands read with ``--model``: the files of ``--text``, or the default corpus."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_moe.cli.arguments import named_path
from lightning_moe.errors import UserError

if TYPE_CHECKING:
    from lightning_moe.analysis.text import Domain
    from lightning_moe.data import Tokenizer


def domains_for(arguments: Sequence[str], tokenizer: Tokenizer, sequence_length: int) -> list[Domain]:
    """Return the domains of ``--text`` or, without it, of the default corpus' validation text.

    Args:
        arguments: values of ``--text``, each ``[NAME=]PATH``.
        tokenizer: tokenizer of the model.
        sequence_length: number of tokens of a window.

    Raises:
        UserError: a file cannot be read, or two have one name.
    """
    from lightning_moe.analysis.text import held_out_domains
    from lightning_moe.runs.released import default_text

    if not arguments:
        return held_out_domains(default_text(tokenizer, sequence_length))
    return file_domains(arguments, tokenizer)


def file_domains(arguments: Sequence[str], tokenizer: Tokenizer, others: Sequence[Domain] = ()) -> list[Domain]:
    """Return the given domains, and those of ``--text`` after them.

    Raises:
        UserError: a file cannot be read, or two domains have one name.
    """
    from lightning_moe.analysis.text import file_domain

    domains = list(others)
    for argument in arguments:
        name, path = named_path("--text", argument)
        name = name or Path(path).stem
        if name in [domain.name for domain in domains]:
            raise UserError(f"--text {argument}: the domain {name!r} exists already; give another name: NAME={path}.")
        domains.append(file_domain(name, path, tokenizer))
    return domains
