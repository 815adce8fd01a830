"""The domain of each validation token, against a loop over documents."""

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_corpus import datamodule, write_corpus

from lightning_moe.data import LocalFiles, TextDataModule
from lightning_moe.data.domains import TokenDomains


@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from("cab")), min_size=1, max_size=12), st.data())
def test_a_token_belongs_to_the_domain_of_its_document(documents: list[tuple[int, str]], data: st.DataObject) -> None:
    row = [domain for length, domain in documents for _ in range(length)]
    starts = [sum(length for length, _ in documents[:i]) for i in range(len(documents))]
    domains = TokenDomains(starts, [domain for _, domain in documents])
    assert list(domains.names) == sorted(set(row))
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(row)), st.integers(0, len(row)))))
    assert [domains.names[number] for number in domains.of(start, stop)] == row[start:stop]


def two_domains(folder: Path, **settings: Any) -> TextDataModule:
    files = {
        name: [str(write_corpus(folder / f"{name}.jsonl", 30, seed))] for seed, name in enumerate(("prose", "code"))
    }
    module = datamodule(folder, corpus=LocalFiles(files), **settings)
    module.prepare_data()
    module.setup("validate")
    return module


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_label_has_the_domain_of_its_document(tmp_path: Path, num_workers: int) -> None:
    module = two_domains(tmp_path, num_workers=num_workers, sequence_length=17)
    loader = module.val_dataloader()
    assert loader.domain_names == ("code", "prose")
    batches = list(loader)
    labels, domains = (torch.cat([batch[key] for batch in batches]) for key in ("labels", "domains"))
    assert domains.dtype == torch.int64
    assert domains.shape == labels.shape
    assert torch.equal(domains == -100, labels == -100)  # the end of the last window is padding
    assert (labels == -100).any()
    expected, documents = [], module.store.documents("validation")
    ends = [*documents["start"][1:], len(module.store.tokens("validation"))]
    for start, end, domain in zip(documents["start"], ends, documents["domain"], strict=True):
        expected += [domain] * (end - start)
    found = [loader.domain_names[number] for number in domains[labels != -100].tolist()]
    assert found == expected[1:]  # nothing predicts the very first token
    counts = {name: counts.tokens for name, counts in module.store.domain_counts("validation").items()}
    assert Counter(expected) == counts


def test_windows_may_hold_both_domains(tmp_path: Path) -> None:
    """So a window's loss cannot be that of a domain."""
    batches = list(two_domains(tmp_path).val_dataloader())
    assert any(len(set(row.tolist()) - {-100}) == 2 for batch in batches for row in batch["domains"])


def test_training_and_a_text_of_one_domain_have_no_domains(tmp_path: Path) -> None:
    assert next(iter(two_domains(tmp_path).train_dataloader())).keys() == {"input_ids", "labels"}
    (tmp_path / "one").mkdir()
    module = datamodule(tmp_path / "one")
    module.prepare_data()
    module.setup("validate")
    loader = module.val_dataloader()
    assert loader.domain_names == ()
    assert next(iter(loader)).keys() == {"input_ids", "labels"}


def test_workers_get_the_borders_of_domains_and_not_one_number_per_token(tmp_path: Path) -> None:
    domains = TokenDomains(range(0, 100_000, 10), ["a"] * 5_000 + ["b"] * 5_000)
    again = pickle.loads(pickle.dumps(domains))
    assert len(pickle.dumps(domains)) < 1000
    assert again.of(49_998, 50_002).tolist() == [0, 0, 1, 1]
