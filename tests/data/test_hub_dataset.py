"""`datasets` as a corpus: prepared or streamed, with exact resume of the stream."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from small_corpus import SEQUENCE, Stop, Window, Witness, datamodule, ready, trainer, write_corpus

from lightning_moe.data import HubDataset, LocalFiles, TextDataModule, TokenizerConfig
from lightning_moe.data.split import split_of
from lightning_moe.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:.*ckpt_path"),
]

DOCUMENTS = 40
HEAD = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    import datasets

    folder = tmp_path_factory.mktemp("hub")
    texts = [json.loads(line)["text"] for line in write_corpus(folder / "c.jsonl", DOCUMENTS).read_text().splitlines()]
    (folder / "parquet").mkdir()
    for i, part in enumerate((texts[:15], texts[15:])):
        pq.write_table(pa.table({"text": part, "n": range(len(part))}), folder / "parquet" / f"{i}.parquet")
    cache = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder / "cache of datasets"
    datasets.disable_progress_bars()
    yield folder
    datasets.config.HF_DATASETS_CACHE = cache


def texts_of(corpus: HubDataset | LocalFiles) -> list[str]:
    return [d.text for d in corpus.documents()]


def test_the_same_documents_as_from_the_files(folder: Path) -> None:
    expected = texts_of(LocalFiles([str(folder / "parquet")]))
    assert len(expected) == DOCUMENTS
    name = str(folder / "parquet")
    assert texts_of(HubDataset(name)) == expected
    assert texts_of(HubDataset(name, max_documents=7)) == expected[:7]
    assert texts_of(HubDataset(name, max_documents=1000)) == expected
    assert texts_of(HubDataset(name, streaming=True, head_documents=9)) == expected[:9]
    assert texts_of(HubDataset(name, streaming=True, max_documents=5)) == expected[:5]
    first = next(HubDataset(name, domain="prose").documents())
    assert (first.name, first.domain) == ("train#0", "prose")


def test_fingerprint(folder: Path, tmp_path: Path) -> None:
    name = str(folder / "parquet")
    fields = [
        HubDataset(name).fingerprint_fields(),
        HubDataset(name, streaming=True).fingerprint_fields(),
        HubDataset(name, max_documents=5).fingerprint_fields(),
        HubDataset("HuggingFaceFW/fineweb-edu").fingerprint_fields(),
        HubDataset("HuggingFaceFW/fineweb-edu", revision="main").fingerprint_fields(),
    ]
    assert len({json.dumps(f) for f in fields}) == len(fields)
    (tmp_path / "copy").mkdir()
    for file in (folder / "parquet").iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    assert HubDataset(str(tmp_path / "copy")).fingerprint_fields() == fields[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_defects(folder: Path, tmp_path: Path, streaming: bool) -> None:
    name = str(folder / "parquet")
    with pytest.raises(UserError, match=r"text_key='body' is not a column of .*\['text', 'n'\]"):
        list(HubDataset(name, text_key="body", streaming=streaming).documents())
    with pytest.raises(UserError, match=r"'n' of .* is int, not a string"):
        list(HubDataset(name, text_key="n", streaming=streaming).documents())
    with pytest.raises(UserError, match=r"cannot load .*split=test"):
        list(HubDataset(name, split="test", streaming=streaming).documents())


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot load 'someone/something'.*Without a network"):
        list(HubDataset("someone/something").documents())


def streamed(folder: Path, **settings: Any) -> TextDataModule:
    corpus = HubDataset(str(folder / "parquet"), streaming=True, head_documents=HEAD)
    return datamodule(folder, corpus=corpus, **settings)


@pytest.fixture(scope="module")
def expected_windows(folder: Path) -> list[Window]:
    """Two passes over the training documents, encoded one by one and cut by a plain loop."""
    tokenizer = ready(streamed(folder)).tokenizer
    tokens: list[int] = []
    for text in 2 * texts_of(LocalFiles([str(folder / "parquet")])):
        if split_of(text, 0.2) == "train":
            tokens += [0, *tokenizer.encode(text)]
    return [tuple(tokens[i : i + SEQUENCE]) for i in range(0, len(tokens) - SEQUENCE, SEQUENCE)]


def order(witness: Witness) -> list[Window]:
    return [window for step in sorted(witness.steps) for window in witness.steps[step]]


def test_streamed_windows_are_the_packed_documents(folder: Path, expected_windows: list[Window]) -> None:
    steps = len(expected_windows) // 8  # into the second pass
    witness = Witness()
    module = streamed(folder)
    trainer(folder, max_steps=steps).fit(witness, datamodule=module)
    assert order(witness) == expected_windows[: steps * 8]
    batch = next(iter(streamed_loader(folder)))
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])

    head = texts_of(LocalFiles([str(folder / "parquet")]))[:HEAD]
    assert module.validation_text().decode() == "".join(t for t in head if split_of(t, 0.2) == "validation")
    assert "train_tokens" not in module.describe()


def streamed_loader(folder: Path) -> Any:
    return ready(streamed(folder)).train_dataloader()


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("step", [1, 10, 30])
def test_a_stream_goes_on_where_it_was(
    folder: Path, tmp_path: Path, expected_windows: list[Window], accumulate: int, step: int
) -> None:
    settings = {"max_steps": 35, "accumulate_grad_batches": accumulate}
    reference = Witness()
    trainer(folder, **settings).fit(reference, datamodule=streamed(folder))
    assert order(reference) == expected_windows[: 35 * 8]

    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=step, save_top_k=-1)
    with pytest.raises(Stop):
        trainer(folder, callbacks=[checkpoints], **settings).fit(
            Witness(die_in_batch=step * accumulate + 1), datamodule=streamed(folder)
        )
    witness = Witness()
    trainer(folder, **settings).fit(
        witness, datamodule=streamed(folder), ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True
    )
    assert witness.steps == {s: windows for s, windows in reference.steps.items() if s >= step}
    for resumed, expected in zip(witness.parameters(), reference.parameters(), strict=True):
        assert torch.equal(resumed, expected)


def test_a_stream_killed_inside_a_step_and_other_accumulation(
    folder: Path, tmp_path: Path, expected_windows: list[Window]
) -> None:
    died = OnExceptionCheckpoint(tmp_path, "died")
    with pytest.raises(Stop):
        trainer(folder, max_steps=20, accumulate_grad_batches=4, callbacks=[died]).fit(
            Witness(die_in_batch=30), datamodule=streamed(folder)
        )
    witness = Witness()
    trainer(folder, max_steps=20, accumulate_grad_batches=2).fit(
        witness, datamodule=streamed(folder), ckpt_path=tmp_path / "died.ckpt"
    )
    assert min(witness.steps) == 7
    assert order(witness) == expected_windows[7 * 8 : 20 * 8]


def test_a_stream_needs_max_steps(folder: Path) -> None:
    with pytest.raises(UserError, match=r"set trainer\.max_steps"):
        trainer(folder, max_epochs=1).fit(Witness(), datamodule=streamed(folder))


def test_a_stream_without_training_text(folder: Path, tmp_path: Path) -> None:
    """All documents held out: an error, not an endless search."""
    path = tmp_path / "one"
    path.mkdir()
    texts = [t for t in texts_of(LocalFiles([str(folder / "parquet")])) if split_of(t, 0.2) == "validation"]
    pq.write_table(pa.table({"text": texts}), path / "a.parquet")
    corpus = HubDataset(str(path), streaming=True)
    with pytest.raises(UserError, match="no text to train a tokenizer"):
        ready(datamodule(folder, corpus=corpus))
    given = TokenizerConfig(300, str(ready(streamed(folder)).store.directory / "tokenizer.json"))
    module = ready(datamodule(folder, corpus=corpus, tokenizer=given))
    with pytest.raises(UserError, match="only held-out documents"):
        next(iter(module.train_dataloader()))


@pytest.mark.parametrize("rows", [[{"body": "x"}], [{"text": ["x"]}], ["no JSON"]])
def test_rows_that_cannot_be_streamed_are_one_line(folder: Path, tmp_path: Path, rows: list[Any]) -> None:
    """The first file is good, so the error comes in the middle of training."""
    good = "".join(json.dumps({"text": f"good text {number}"}) + "\n" for number in range(40))
    bad = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.jsonl").write_text(good)
    (tmp_path / "d/b.jsonl").write_text(bad)
    with pytest.raises(UserError, match=r"data\.corpus: ") as caught:
        list(HubDataset(str(tmp_path / "d"), streaming=True, head_documents=60).documents())
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "d") in str(caught.value)
    with pytest.raises(UserError, match=r"data\.corpus: "):  # the head is in the first file, and training comes later
        next(HubDataset(str(tmp_path / "d"), streaming=True, head_documents=5).documents())
    corpus = HubDataset(str(tmp_path / "d"), streaming=True)
    with pytest.raises(UserError, match=r"data\.corpus: "):
        list(corpus.rows(corpus.load()))
