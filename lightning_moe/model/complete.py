"""Continuing text: `generate_stream` with a tokenizer, stop strings and whole characters."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.model.causal_lm import CausalLM
from lightning_moe.model.generate import check_room, generate_stream

#: reason why a row ended: a stop string, the end of the document, or ``max_new_tokens``
Finish = Literal["stop", "end_of_text", "length"]


class TextCodec(Protocol):
    """What `complete` needs of a tokenizer (`data.Tokenizer` is one)."""

    @property
    def end_of_text_id(self) -> int:
        """The token with which every document begins."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of text of token ids."""


@dataclass(frozen=True)
class Piece:
    """One token of a row. The pieces of a row come in order, one for every token from its prompt's first on.

    Args:
        row: index of the prompt.
        token: id of the token.
        text: text that it adds: nothing while a character is incomplete, or where a stop string begins.
        sampled: whether it was sampled; false for the prompt's tokens.
        experts: bool [L, E], the routed experts of the token per MoE layer; `None` unless asked for.
        log_prob: log-probability of a sampled token, at temperature 1 and over the whole vocabulary; `None` for the
            prompt's tokens.
        finish: reason why the row ends here; `None` before its last piece.
    """

    row: int
    token: int
    text: str
    sampled: bool
    experts: Tensor | None
    log_prob: float | None
    finish: Finish | None = None

    @property
    def fanout(self) -> int | None:
        """Routed experts of the token, summed over layers."""
        return None if self.experts is None else int(self.experts.sum())


@dataclass(frozen=True)
class Completion:
    """A finished row.

    Args:
        text: new text, up to a stop string.
        tokens: new tokens, those of the stop string included.
        finish: reason why it ended.
        experts: bool [tokens of prompt and continuation, L, E]; `None` unless asked for.
    """

    text: str
    tokens: list[int]
    finish: Finish
    experts: Tensor | None


def complete(
    model: CausalLM, tokenizer: TextCodec, prompts: Sequence[str], max_new_tokens: int, **options: Any
) -> list[Completion]:
    """Return the continuation of each prompt; the arguments are those of `stream_text`."""
    pieces: list[list[Piece]] = [[] for _ in prompts]
    for piece in stream_text(model, tokenizer, prompts, max_new_tokens, **options):
        pieces[piece.row].append(piece)
    return [_completion(row) for row in pieces]


def _completion(pieces: list[Piece]) -> Completion:
    new = [piece for piece in pieces if piece.sampled]
    experts = [piece.experts for piece in pieces if piece.experts is not None]
    finish = pieces[-1].finish
    assert finish is not None
    return Completion(
        "".join(piece.text for piece in new),
        [piece.token for piece in new],
        finish,
        torch.stack(experts) if experts else None,
    )


def stream_text(
    model: CausalLM,
    tokenizer: TextCodec,
    prompts: Sequence[str],
    max_new_tokens: int,
    stop: Sequence[str] = (),
    with_experts: bool = False,
    batch_size: int | None = None,
    seed: int | None = None,
    **sampling: Any,
) -> Iterator[Piece]:
    """Continue texts of any lengths, and yield each token as soon as its text is certain.

    A prompt is the beginning of a document: ``<|endoftext|>`` goes before it, so it may be empty. A row ends before the
    first of its ``stop`` strings, at ``<|endoftext|>``, or after ``max_new_tokens``. Text that may still become a stop
    string is held back.

    Args:
        model: the decoder.
        tokenizer: tokenizer that the model was trained with.
        prompts: the texts.
        max_new_tokens: largest number of new tokens per prompt.
        stop: strings that end a row.
        with_experts: whether the experts of every token are reported, see `Piece`.
        batch_size: number of prompts that are continued at a time; `None` means all.
        seed: random seed for sampling; `None` continues torch's global generator.
        sampling: options ``temperature``, ``top_k`` and ``top_p`` of `generate_stream`.

    Raises:
        UserError: a stop string is empty, or ``batch_size`` is below 1; or, before the first piece, for the reasons of
            `generate_stream`.
    """
    if "" in stop:
        raise UserError("stop='': an empty string ends every text before it begins; leave it out.")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size={batch_size}: must be at least 1, or None for all prompts at once.")
    start = tokenizer.end_of_text_id
    ids = [[start, *tokenizer.encode(prompt)] for prompt in prompts]
    check_room(model, [len(prompt) for prompt in ids], max_new_tokens, with_experts)
    stops = [text.encode() for text in stop]
    device = model.device
    generator = None if seed is None else torch.Generator(device=device).manual_seed(seed)
    size = len(ids) if batch_size is None else batch_size
    for first in range(0, len(ids), size):
        rows = [
            _Row(first + number, prompt, tokenizer, stops) for number, prompt in enumerate(ids[first : first + size])
        ]
        chunks = generate_stream(
            model,
            [row.prompt for row in rows],
            max_new_tokens,
            seed=generator,
            stop=lambda row, new, rows=rows: rows[row].ends_with(new[-1]),  # type: ignore[misc]
            with_experts=with_experts,
            **sampling,
        )
        for chunk in chunks:
            experts = None if chunk.experts is None else chunk.experts.cpu()
            log_probs = chunk.log_probs.tolist()
            for number, row in enumerate(rows):
                for index in range(chunk.tokens.shape[1]):
                    of_token = None if experts is None else experts[number, index]
                    row.take(bool(chunk.sampled[number, index]), of_token, log_probs[number][index])
                yield from row.ready(max_new_tokens)


class _Row:
    """The text of one row, and which of its tokens were yielded."""

    def __init__(self, index: int, prompt: list[int], tokenizer: TextCodec, stops: list[bytes]) -> None:
        self.index, self.prompt, self.tokenizer, self.stops = index, prompt, tokenizer, stops
        self.tokens = list(prompt)
        self.text = bytearray(tokenizer.decode_bytes(prompt))
        self.prompt_bytes = len(self.text)
        self.finish: Finish | None = None
        self.end: int | None = None  # bytes of text before the stop string
        self._known: list[tuple[Tensor | None, float]] = []  # experts and log-probability of the tokens reached
        self._out = self._out_bytes = 0  # tokens that were yielded, and the bytes up to there
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def ends_with(self, token: int) -> bool:
        """Add a sampled token, and return whether the row ends with it."""
        self.tokens.append(token)
        if token == self.tokenizer.end_of_text_id:
            self.finish = "end_of_text"
            return True
        searched = len(self.text) - max(map(len, self.stops), default=0) + 1
        self.text += self.tokenizer.decode_bytes([token])
        found = [self.text.find(stop, max(self.prompt_bytes, searched)) for stop in self.stops]
        if any(position >= 0 for position in found):
            self.end = min(position for position in found if position >= 0)
            self.finish = "stop"
        return self.finish is not None

    def take(self, sampled: bool, experts: Tensor | None, log_prob: float) -> None:
        """Take note that the stream has reached the row's next token, unless the row has ended before."""
        if sampled or len(self._known) < len(self.prompt):
            self._known.append((experts, log_prob))

    def ready(self, max_new_tokens: int) -> Iterator[Piece]:
        """Yield the tokens whose text is certain by now."""
        if len(self.tokens) == len(self.prompt) + max_new_tokens and self.finish is None:
            self.finish = "length"
        certain = len(self.text) - (0 if self.finish else self._undecided())
        while self._out < len(self._known):
            token = self.tokens[self._out]
            data = self.tokenizer.decode_bytes([token])
            end = self._out_bytes + len(data)
            if self._out >= len(self.prompt) and end > certain:
                return
            last = self.finish is not None and self._out + 1 == len(self.tokens)
            visible = data if self.end is None else data[: max(0, self.end - self._out_bytes)]
            text = self._decoder.decode(visible, final=last)
            sampled = self._out >= len(self.prompt)
            experts, log_prob = self._known[self._out]
            self._out, self._out_bytes = self._out + 1, end
            finish = self.finish if last else None
            yield Piece(self.index, token, text, sampled, experts, log_prob if sampled else None, finish)

    def _undecided(self) -> int:
        """Return the number of bytes at the end that may be the beginning of a stop string."""
        longest = max(map(len, self.stops), default=1) - 1
        tail = bytes(self.text[max(self.prompt_bytes, len(self.text) - longest) :])
        lengths = range(len(tail), 0, -1)
        return next((n for n in lengths if any(stop.startswith(tail[-n:]) for stop in self.stops)), 0)
