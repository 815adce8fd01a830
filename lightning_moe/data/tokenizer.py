"""Byte-level BPE: trained on the corpus, or given as a `tokenizers` JSON file."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import tokenizers
import torch
from annotated_types import Interval
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from typing_extensions import TypedDict

from lightning_moe.atomic import write_atomically
from lightning_moe.data.document_start import without_document_start
from lightning_moe.errors import UserError
from lightning_moe.file_schema import parse_json, read_bytes
from lightning_moe.user_paths import user_path

END_OF_TEXT = "<|endoftext|>"

MODEL_KEY = "lightning_moe_document_start"  # in the file of a released model's tokenizer

# Words with at most one leading non-letter, up to three digits, punctuation, line ends, spaces. On the standard library
# this gives 3 % fewer tokens than GPT-2's pattern (3.47 bytes per token instead of 3.36, vocabulary 4096).
SPLIT_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Texts that a normalizer, a prefix space, an unknown token or a parsed special token would change.
PROBES = ("word", " two  spaces", "\ttab\r\n\n", "e\u0301 \u212b \ufb01 CASE", "\x00\ufeff\U0001f99c", END_OF_TEXT)


Id = Annotated[int, Interval(ge=0, lt=2**24)]  # a table of all tokens must fit into memory


class _Model(TypedDict):
    """Part of a tokenizer file: what the library takes, but ends the process with, or what can be no byte-level one."""

    vocab: dict[str, Id] | list[Any]
    continuing_subword_prefix: NotRequired[Literal[""] | None]
    end_of_word_suffix: NotRequired[Literal[""] | None]


class _AddedToken(TypedDict):
    id: Id
    content: str


class _TokenizerFile(TypedDict):
    model: _Model
    added_tokens: list[_AddedToken]
    lightning_moe_document_start: NotRequired[str]


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer is used: a given file, or one that is trained on the corpus.

    Args:
        vocab_size: Number of tokens, `<|endoftext|>` and the 256 bytes included. A given file must match it.
        file: File of a byte-level tokenizer (the `tokenizer.json` of the `tokenizers` library). Null: a tokenizer is
            trained on the training split.
        training_bytes: Largest amount of text that it is trained on: the documents with the smallest content hashes.
    """

    vocab_size: int = 4096
    file: str | None = None
    training_bytes: int = 32 * 2**20

    def __post_init__(self) -> None:
        if self.vocab_size < 257:
            raise UserError(
                f"data.tokenizer.vocab_size={self.vocab_size}: at least 257 are needed (256 bytes and {END_OF_TEXT})."
            )
        if self.training_bytes < 1:
            raise UserError(f"data.tokenizer.training_bytes={self.training_bytes} must be positive.")

    def fingerprint_fields(self) -> dict[str, object]:
        """Return what decides the tokenizer, for one corpus and split."""
        if self.file is None:
            return {"vocab_size": self.vocab_size, "training_bytes": self.training_bytes, "split": SPLIT_PATTERN}
        return {"vocab_size": self.vocab_size, "file_sha256": hashlib.sha256(_read_bytes(self.file)).hexdigest()}


class Tokenizer:
    """A lossless byte-level BPE: `decode(encode(text)) == text` for every text; or the tokenizer of a released model.

    Special tokens are never read from a text: a literal `<|endoftext|>` in a document is ordinary text.

    Args:
        backend: tokenizer of the `tokenizers` library.
        source: where it comes from, for messages.
        document_start: token that begins every document for a released model, whose tokenizer is taken as it is and
            may normalise text; `None` for a tokenizer of our own, which is lossless and begins with `<|endoftext|>`.

    Raises:
        UserError: there is no such token, or a tokenizer of our own is not lossless.
    """

    def __init__(self, backend: tokenizers.Tokenizer, source: str, document_start: str | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        start = document_start or END_OF_TEXT
        end_of_text = backend.token_to_id(start)
        if end_of_text is None:
            raise UserError(f"{source} has no {start} token, which starts every document.")
        self._backend, self._document_start = backend, document_start
        self.end_of_text_id: int = end_of_text
        self.vocab_size: int = max(backend.get_vocab().values()) + 1
        if document_start is None:
            self._check_lossless(source)

    def _check_lossless(self, source: str) -> None:
        requirement = "It needs a ByteLevel pre-tokenizer, all 256 bytes, no prefix space and no normalizer."
        missing = 256 - len({text for text in self._bytes_of_token if len(text) == 1})
        if missing:
            raise UserError(f"{source} is not a byte-level tokenizer: {missing} bytes have no token. {requirement}")
        for text in PROBES:
            ids = self.encode(text)
            if self.decode(ids) != text or self.end_of_text_id in ids:
                raise UserError(f"{source} is not lossless: {text!r} came back as {self.decode(ids)!r}. {requirement}")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train on `texts`; `<|endoftext|>` gets id 0.

        Raises:
            UserError: the texts are too few for `vocab_size`.
        """
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        if backend.get_vocab_size() != vocab_size:
            raise UserError(
                f"data.tokenizer.vocab_size={vocab_size}: the training text is too small, it gives only "
                f"{backend.get_vocab_size()} tokens. Set vocab_size to that or less, or give more text."
            )
        return cls(backend, "the trained tokenizer")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a JSON file of the `tokenizers` library.

        Raises:
            UserError: it is missing, is no such file, or is not lossless.
        """
        return cls.from_text(_read_bytes(path).decode(errors="replace"), str(path))

    @classmethod
    def from_text(cls, text: str, source: str) -> "Tokenizer":
        """Read the content of such a file; ``source`` names it in messages.

        Raises:
            UserError: it is no such content, or is not lossless.
        """
        problem = f"{source} is not a tokenizer file of the `tokenizers` library"
        document_start = parse_json(text, _TokenizerFile, problem).get("lightning_moe_document_start")
        if document_start is not None:
            text = json.dumps({key: value for key, value in json.loads(text).items() if key != MODEL_KEY})
        try:
            backend = tokenizers.Tokenizer.from_str(without_document_start(text))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{problem}: {error}") from None
        return cls(backend, source, document_start)

    def to_text(self) -> str:
        """Return the content of the JSON file of the `tokenizers` library; for a released model, with one more key."""
        text = str(self._backend.to_str())
        if self._document_start is None:
            return text
        return json.dumps({**json.loads(text), MODEL_KEY: self._document_start}, ensure_ascii=False)

    def save(self, path: str | Path) -> None:
        """Write the JSON file of the `tokenizers` library."""
        write_atomically(Path(path), self.to_text().encode())

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without a leading `<|endoftext|>`."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text, on all cores."""
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids; special tokens give none, bytes that are not UTF-8 the replacement character."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the exact bytes of text of the ids, whether or not they begin and end at a character."""
        table = self._bytes_of_token
        return b"".join([table[i] for i in ids])

    @cached_property
    def token_bytes(self) -> torch.Tensor:
        """Bytes of text of each token, int64 [vocab_size]; 0 for special tokens."""
        return torch.tensor([len(text) for text in self._bytes_of_token], dtype=torch.int64)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of everything that decides the encoding."""
        return hashlib.sha256(self.to_text().encode()).hexdigest()[:16]

    @cached_property
    def _bytes_of_token(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        bytes_of = _bytes_of_piece if self._has_pieces else _bytes_of_characters
        for token, i in self._backend.get_vocab(with_added_tokens=False).items():
            table[i] = bytes_of(token)
        for i, added in self._backend.get_added_tokens_decoder().items():
            table[i] = b"" if added.special else added.content.encode()
        return table

    @property
    def _has_pieces(self) -> bool:
        """Whether tokens are spelled as in SentencePiece: ``▁`` for a space, ``<0x0A>`` for a byte."""
        vocabulary = self._backend.get_vocab()
        return self._document_start is not None and "<0x0A>" in vocabulary and "Ċ" not in vocabulary


def _bytes_of_characters(token: str) -> bytes:
    # A character outside of the alphabet means "not byte-level": the check then fails.
    return bytes(_BYTE_OF_CHARACTER.get(character, 0) for character in token)


def _bytes_of_piece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def _byte_of_character() -> dict[str, int]:
    """Return the byte-level alphabet: printable Latin-1 bytes stand for themselves, the others begin at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _read_bytes(path: str | Path) -> bytes:
    try:
        return read_bytes(user_path(path, "data.tokenizer.file"), f"Tokenizer file (data.tokenizer.file) {path}")
    except FileNotFoundError:
        raise UserError(f"Tokenizer file (data.tokenizer.file) {path}: No such file or directory.") from None
