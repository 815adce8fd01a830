"""The tokenizer loses nothing, parses no special tokens out of text, and counts bytes exactly."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lightning_moe.data.tokenizer import END_OF_TEXT, Tokenizer, TokenizerConfig
from lightning_moe.errors import UserError

TEXTS = ["def f(self, x):\n    return self.x + 1\n" * 3, "It's 2026: naïve café, 12345 — 日本\n", "  \t\r\n  spaces  "]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


# Pieces that tokenizers get wrong, mixed with anything that UTF-8 can write.
awkward = st.sampled_from([END_OF_TEXT, "<|endoftext", "\r\n", "\n\n  ", "\x00", "e\u0301", "\ufeff", " a", "'s"])
any_text = st.lists(awkward | st.text(st.characters(codec="utf-8")), max_size=8).map("".join)


@given(any_text)
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.end_of_text_id not in ids
    assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode())
    assert tokenizer.encode_batch([text, "x"])[0] == ids


def test_end_of_text_is_token_0_and_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.end_of_text_id == 0
    assert tokenizer.token_bytes[0] == 0
    assert int((tokenizer.token_bytes == 0).sum()) == 1
    assert tokenizer.decode([0, *tokenizer.encode("a"), 0]) == "a"


def test_single_tokens_agree_with_the_librarys_decoder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "t.json")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    for i in range(1, 300):
        text = library.decode([i])
        if "\ufffd" not in text:  # whole characters
            assert tokenizer.decode_bytes([i]) == text.encode()


def test_half_a_character_decodes_to_the_replacement_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\U0001f99c")
    assert tokenizer.decode(ids[:1]) == "\ufffd"
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == "\U0001f99c".encode()


def test_training_does_not_depend_on_the_order_of_texts() -> None:
    random.seed(0)
    texts = ["".join(random.choices("abcde ", k=50)) for _ in range(50)]
    first = Tokenizer.train(texts, 280)
    random.shuffle(texts)
    assert Tokenizer.train(texts, 280).fingerprint == first.fingerprint
    assert Tokenizer.train(texts, 281).fingerprint != first.fingerprint


def test_saved_and_loaded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "t.json")
    loaded = Tokenizer.load(tmp_path / "t.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.vocab_size == tokenizer.vocab_size == 300
    assert all(loaded.encode(text) == tokenizer.encode(text) for text in [*TEXTS, END_OF_TEXT])


def test_too_little_text_for_the_vocabulary() -> None:
    with pytest.raises(UserError, match=r"vocab_size=4096.*gives only \d+ tokens"):
        Tokenizer.train(["hello"], 4096)


def test_vocabulary_without_room_for_the_bytes() -> None:
    with pytest.raises(UserError, match="vocab_size=256"):
        TokenizerConfig(vocab_size=256)


def save_backend(path: Path, **changes: object) -> Path:
    """A byte-level tokenizer file of another making (GPT-2's split, end of text last), with a defect."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens([END_OF_TEXT])
    for name, value in changes.items():
        setattr(backend, name, value)
    backend.save(str(path))
    return path


def test_a_given_file_is_accepted(tmp_path: Path) -> None:
    given_file = Tokenizer.load(save_backend(tmp_path / "t.json"))
    assert given_file.end_of_text_id == given_file.vocab_size - 1
    text = f"naïve {END_OF_TEXT} 日本"
    assert given_file.decode(given_file.encode(text)) == text
    assert given_file.end_of_text_id not in given_file.encode(text)


@pytest.mark.parametrize(
    "defect",
    [
        {"normalizer": normalizers.NFC()},
        {"normalizer": normalizers.Lowercase()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
    ],
    ids=["nfc", "lowercase", "prefix space", "whitespace"],
)
def test_a_file_that_changes_text_is_refused(tmp_path: Path, defect: dict[str, object]) -> None:
    path = save_backend(tmp_path / "lossy.json", **defect)
    with pytest.raises(UserError, match=r"lossy\.json is not lossless"):
        Tokenizer.load(path)


def test_a_file_without_all_bytes_is_refused(tmp_path: Path) -> None:
    path = save_backend(tmp_path / "t.json")
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {"a": 0, "b": 1}
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="254 bytes have no token"):
        Tokenizer.load(path)


def test_a_file_without_end_of_text_is_refused(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match=r"t\.json has no <\|endoftext\|>"):
        Tokenizer.load(tmp_path / "t.json")


def test_a_file_that_is_missing_or_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.json: No such file"):
        Tokenizer.load(tmp_path / "nothing.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other\.json is not a tokenizer file"):
        Tokenizer.load(tmp_path / "other.json")
