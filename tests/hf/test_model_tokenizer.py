"""Tokenizers of released models: their own ids, bytes that add up, and a document start that survives being stored."""

from pathlib import Path

import pytest

from lightning_moe.data import Tokenizer
from lightning_moe.errors import UserError
from lightning_moe.hf.tokenizer import model_tokenizer
from tests.helpers.hf_tokenizers import END_OF_TEXT, VOCABULARY, TokenizerKind, make_tokenizer

TEXTS = ("def f(x):\n    return x + 1\n", "Two  spaces, a tab\t, naïve café, 数, 🦜.", END_OF_TEXT)


@pytest.mark.parametrize("kind", ["byte_level", "nfc", "metaspace"])
def test_ids_are_those_of_transformers_and_bytes_those_of_the_text(kind: TokenizerKind, tmp_path: Path) -> None:
    theirs = make_tokenizer(kind)
    theirs.save_pretrained(tmp_path)
    found = model_tokenizer(str(tmp_path), VOCABULARY)
    assert found.end_of_text_id == theirs.bos_token_id
    for text in TEXTS[:2]:
        ids = found.encode(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        extra = 1 if kind == "metaspace" else 0  # the space that it puts before a text
        assert found.decode_bytes(ids)[extra:] == text.encode()
        assert int(found.token_bytes[ids].sum()) == len(text.encode()) + extra
    assert found.end_of_text_id not in found.encode(END_OF_TEXT)  # a special token is never read from a text
    again = Tokenizer.from_text(found.to_text(), "a checkpoint")
    assert (again.fingerprint, again.end_of_text_id) == (found.fingerprint, found.end_of_text_id)
    assert again.encode(TEXTS[0]) == found.encode(TEXTS[0])
    found.save(tmp_path / "again.json")
    assert Tokenizer.load(tmp_path / "again.json").fingerprint == found.fingerprint


def test_composed_characters_are_counted_as_the_model_reads_them(tmp_path: Path) -> None:
    make_tokenizer("nfc").save_pretrained(tmp_path)
    found = model_tokenizer(str(tmp_path))
    assert found.decode(found.encode("e\u0301")) == "\u00e9"


def test_a_file_alone_will_do(tmp_path: Path) -> None:
    make_tokenizer("byte_level").save_pretrained(tmp_path)
    found = model_tokenizer(str(tmp_path / "tokenizer.json"), VOCABULARY, "--tokenizer")
    assert found.encode("def f") == model_tokenizer(str(tmp_path)).encode("def f")
    assert found.end_of_text_id == 0


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    make_tokenizer("byte_level").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"ids up to 511, but the model knows 300 tokens: it does not belong"):
        model_tokenizer(str(tmp_path), 300)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--model .*: no tokenizer can be read there"):
        model_tokenizer(str(tmp_path))
