"""Text continued by a model: stop strings, whole characters and what is held back, against the whole text cut."""

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moe.errors import UserError
from lightning_moe.model import Decoder, DecoderConfig, complete, stream_text
from lightning_moe.routing import ExpertThreshold

#: tokens of one to three bytes, among them halves of the character é (c3 a9) and tokens that share beginnings
VOCABULARY = [b"", b"a", b"b", b"ab", b"ba", b"\n", b"\xc3", b"\xa9", b"a\xc3", b"bab", b" ", b"c"]


class Codec:
    """Byte-wise encoding with the vocabulary above."""

    end_of_text_id = 0

    def encode(self, text: str) -> list[int]:
        return [VOCABULARY.index(bytes([byte])) for byte in text.encode()]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(VOCABULARY[token] for token in ids)


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(3)
    config = DecoderConfig(
        vocab_size=len(VOCABULARY),
        max_sequence_length=40,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_experts=4,
        logit_softcap=1.0,  # nearly uniform: all kinds of text
    )
    model = Decoder(config, ExpertThreshold())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def expected(prompt: str, model: Decoder, stop: list[str], seed: int) -> tuple[str, str]:
    """Text and end of a single row: sample without stop strings, then cut."""
    ids = [0, *Codec().encode(prompt)]
    tokens = model_tokens(model, ids, seed)
    cut = tokens.index(0) if 0 in tokens else len(tokens)
    data = Codec().decode_bytes(tokens[:cut])
    found = [position for text in stop if (position := data.find(text.encode())) >= 0]
    if found:
        return data[: min(found)].decode(errors="replace"), "stop"
    return data.decode(errors="replace"), "end_of_text" if cut < len(tokens) else "length"


def model_tokens(model: Decoder, ids: list[int], seed: int) -> list[int]:
    from lightning_moe.model import generate

    return generate(model, torch.tensor([ids]), 20, seed=seed)[0, len(ids) :].tolist()


@settings(max_examples=20)
@given(
    seed=st.integers(0, 200),
    prompt=st.sampled_from(["", "ab", "b\n"]),
    stop=st.lists(st.sampled_from(["ab", "aba", "bb", "é", "\n", "cab", "b a"]), max_size=3),
)
def test_text_ends_before_the_first_stop_string(model: Decoder, seed: int, prompt: str, stop: list[str]) -> None:
    [completion] = complete(model, Codec(), [prompt], 20, stop=stop, seed=seed)
    assert (completion.text, completion.finish) == expected(prompt, model, stop, seed)
    assert completion.tokens == model_tokens(model, [0, *Codec().encode(prompt)], seed)[: len(completion.tokens)]


@settings(max_examples=12)
@given(seed=st.integers(0, 200), stop=st.lists(st.sampled_from(["aba", "bb", "é", "cab"]), max_size=2))
def test_what_is_streamed_is_never_taken_back(model: Decoder, seed: int, stop: list[str]) -> None:
    """Every prefix of the pieces is a prefix of the result, although later tokens may complete a stop string."""
    prompts = ["a", "", "abab"]
    pieces = list(stream_text(model, Codec(), prompts, 20, stop=stop, seed=seed))
    completions = complete(model, Codec(), prompts, 20, stop=stop, seed=seed)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        of_row = [piece for piece in pieces if piece.row == row]
        assert [piece.token for piece in of_row] == [0, *Codec().encode(prompt), *completion.tokens]
        assert "".join(piece.text for piece in of_row) == prompt + completion.text
        assert [piece.finish for piece in of_row if piece.finish] == [completion.finish]
        assert not any(text in completion.text for text in stop)


def test_prompts_in_batches(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more rows at a time, and no more room in the cache, than needed; each row is as in one batch."""
    shapes: list[tuple[int, int]] = []
    new_cache = Decoder.new_cache

    def spy(self: Decoder, batch_size: int, length: int) -> object:
        shapes.append((batch_size, length))
        return new_cache(self, batch_size, length)

    monkeypatch.setattr(Decoder, "new_cache", spy)
    prompts = ["a", "", "abab", "b", "ab"]
    greedy = {"temperature": 0.0, "with_experts": True}
    at_once = complete(model, Codec(), prompts, 6, **greedy)
    by_two = complete(model, Codec(), prompts, 6, batch_size=2, **greedy)
    assert shapes == [(5, 11), (2, 8), (2, 11), (1, 9)]
    for one, other in zip(at_once, by_two, strict=True):
        assert (one.text, one.tokens, one.finish) == (other.text, other.tokens, other.finish)
        assert torch.equal(one.experts, other.experts)
    same = complete(model, Codec(), ["a"] * 8, 20, batch_size=1, seed=1)
    assert len({tuple(row.tokens) for row in same}) > 4, "one generator goes through all batches"
    long = stream_text(model, Codec(), ["a", "b" * 40], 6, batch_size=1)
    with pytest.raises(UserError, match="prompt of 41 tokens"):
        next(long)
    with pytest.raises(UserError, match="batch_size=0: must be at least 1"):
        complete(model, Codec(), ["a"], 6, batch_size=0)


def test_text_without_stop_strings_is_streamed_token_by_token(model: Decoder) -> None:
    seen: list[int] = []
    for piece in stream_text(model, Codec(), ["a"], 6, temperature=0.0):
        seen.append(piece.token)
        if len(seen) == 3:
            break  # the model has not run further than one token ahead
    assert len(seen) == 3


def test_experts_are_those_of_the_full_forward(model: Decoder) -> None:
    completions = complete(model, Codec(), ["ab a", ""], 12, with_experts=True, seed=1)
    model.eval()
    for prompt, completion in zip(("ab a", ""), completions, strict=True):
        ids = [0, *Codec().encode(prompt), *completion.tokens]
        model(torch.tensor([ids]))
        layer = next(model.moe_layers())
        assert torch.equal(completion.experts[:, 0], layer.record.selection.mask[0])


def test_an_empty_stop_string_is_refused(model: Decoder) -> None:
    with pytest.raises(UserError, match="stop=''"):
        complete(model, Codec(), ["a"], 3, stop=["x", ""])
