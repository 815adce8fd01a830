"""Documents are split by content; the tokenizer's sample depends on the set of documents only."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.data.corpora import Document
from lightning_moe.data.split import content_hash, split_of, training_sample


def documents(texts: list[str]) -> list[Document]:
    return [Document(str(i), text, "text") for i, text in enumerate(texts)]


def test_shares_are_as_asked_and_grow_without_moving_documents() -> None:
    texts = [f"document {i}" for i in range(20_000)]
    held_out = {fraction: {t for t in texts if split_of(t, fraction) == "validation"} for fraction in (0.02, 0.1)}
    assert 320 < len(held_out[0.02]) < 480  # 400 ± 4 standard deviations
    assert 1830 < len(held_out[0.1]) < 2170
    assert held_out[0.02] < held_out[0.1]


def test_the_hash_never_changes() -> None:
    """It decides what has been held out of a trained model."""
    assert content_hash("") == 0.8666040914613156
    assert content_hash("a") == 0.26258956056976857
    assert content_hash("naïve") == 0.7769486444925349


@given(st.lists(st.text(alphabet="abc", max_size=12), max_size=30), st.integers(1, 80), st.randoms())
def test_sample_is_the_training_documents_of_smallest_hash(texts: list[str], limit: int, random: Random) -> None:
    chosen = training_sample(documents(texts), 0.2, limit)
    random.shuffle(texts)
    assert sorted(training_sample(documents(texts), 0.2, limit)) == sorted(chosen)

    expected, total = [], 0
    for text in sorted((t for t in texts if t and split_of(t, 0.2) == "train"), key=content_hash):
        total += len(text)
        if total > limit and expected:
            break
        expected.append(text)
    assert sorted(chosen) == sorted(expected)
