"""What the DataModule promises to the model, the tables and the user."""

import gzip
import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from small_corpus import SEQUENCE, VOCAB, Witness, datamodule, ready, trainer, write_corpus

from lightning_moe.data import LocalFiles, StandardLibrary, TextDataModule, TokenizerConfig
from lightning_moe.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    ready(datamodule(folder))
    return folder


def test_batches_are_inputs_and_labels_shifted_by_one(folder: Path) -> None:
    module = ready(datamodule(folder))
    tokens = module.store.tokens("train").tolist()
    stream = " ".join(map(str, tokens))
    for batch, _ in zip(module.train_dataloader(), range(5), strict=False):
        assert batch.keys() == {"input_ids", "labels"}
        for tensor in batch.values():
            assert tensor.shape == (8, SEQUENCE)
            assert tensor.dtype == torch.int64
        assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
        for inputs, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            assert " ".join(map(str, [*inputs, labels[-1]])) in stream


@pytest.mark.parametrize("loader", ["val_dataloader", "test_dataloader", "predict_dataloader"])
def test_every_validation_token_is_scored_once(folder: Path, loader: str) -> None:
    module = ready(datamodule(folder))
    labels = torch.cat([batch["labels"].flatten() for batch in getattr(module, loader)()])
    tokens = module.store.tokens("validation")
    assert labels[labels != -100].tolist() == tokens[1:].tolist()
    assert int(module.token_bytes[labels[labels != -100]].sum()) == len(module.validation_text())


def test_what_it_offers_after_setup(folder: Path) -> None:
    module = datamodule(folder)
    assert module.vocab_size == VOCAB  # known before
    ready(module)
    texts = {json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines()}
    text = module.validation_text()
    assert gzip.decompress(gzip.compress(text)) == text
    held_out = [t for t in texts if t.encode() in text]
    assert sum(map(len, held_out)) == len(text)
    assert module.token_bytes.shape == (VOCAB,)
    assert module.tokenizer.decode(module.store.tokens("validation").tolist()).encode() == text
    description = module.describe()
    assert json.loads(json.dumps(description)) == description
    assert description["fingerprint"] == module.fingerprint
    assert description["train_tokens"] == len(module.store.tokens("train"))


def test_fingerprint_is_of_the_windows(folder: Path, tmp_path: Path) -> None:
    fingerprint = ready(datamodule(folder)).fingerprint
    assert ready(datamodule(folder, seed=5, global_batch_size=2, num_workers=1)).fingerprint == fingerprint
    elsewhere = datamodule(folder, cache_dir=str(tmp_path / "other cache"))
    assert ready(elsewhere).fingerprint == fingerprint
    assert ready(datamodule(folder, sequence_length=8)).fingerprint != fingerprint
    assert ready(datamodule(folder, validation_fraction=0.3)).fingerprint != fingerprint
    write_corpus(tmp_path / "corpus.jsonl", seed=1)
    assert ready(datamodule(tmp_path)).fingerprint != fingerprint


def test_position_without_a_trainer(folder: Path) -> None:
    module = ready(datamodule(folder))
    batches = list(zip(module.train_dataloader(), range(6), strict=False))
    module.load_state_dict({**module.state_dict(), "position": 3 * 8})
    for (resumed, _), (expected, _) in zip(
        zip(module.train_dataloader(), range(3), strict=False), batches[3:], strict=True
    ):
        assert torch.equal(resumed["labels"], expected["labels"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_length": 100_000}, r"sequence_length=100000 is longer than the training split, which has \d+"),
        ({"global_batch_size": 1000}, r"global_batch_size=1000 is more than the \d+ windows of 16"),
        ({"tokenizer": TokenizerConfig(vocab_size=30_000)}, "vocab_size=30000: the training text is too small"),
        ({"corpus": LocalFiles(["/does/not/exist.txt"])}, "no file matches /does/not/exist.txt"),
    ],
)
def test_data_that_do_not_suffice(folder: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ready(datamodule(folder, **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_length": 0}, "data.sequence_length=0"),
        ({"global_batch_size": 0}, "data.global_batch_size=0"),
        ({"validation_batch_size": -1}, "data.validation_batch_size=-1"),
        ({"validation_fraction": 0.0}, r"data.validation_fraction=0\.0"),
        ({"validation_fraction": 1.0}, r"data.validation_fraction=1\.0"),
    ],
)
def test_settings_out_of_range(folder: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        datamodule(folder, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate_grad_batches": 3}, r"global_batch_size=8 .* 1 ranks × 3 .* multiple of 3"),
        ({"accumulate_grad_batches": 4, "limit_train_batches": 6}, "6 batches, which is not a multiple .*=4"),
        ({"overfit_batches": 2}, "overfit_batches=2 is not supported"),
    ],
)
def test_trainers_that_do_not_fit(folder: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer(folder, max_steps=4, **settings).fit(Witness(), datamodule=datamodule(folder))


def test_fast_dev_run_and_sanity_check(folder: Path) -> None:
    witness = Witness()
    trainer(folder, fast_dev_run=True, accumulate_grad_batches=4).fit(witness, datamodule=datamodule(folder))
    assert list(witness.steps) == [0]
    trainer(folder, max_steps=1, num_sanity_val_steps=2).fit(witness, datamodule=datamodule(folder))


class Collector(Witness):
    """Returns and counts what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[int] = []

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        self.labels += batch["labels"][batch["labels"] != -100].tolist()
        return batch["labels"]

    test_step = predict_step = validation_step


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_by_a_trainer(folder: Path, stage: str) -> None:
    module, collector = datamodule(folder), Collector()
    run = trainer(folder, limit_val_batches=1.0)
    results = getattr(run, stage)(collector, datamodule=module)
    tokens = module.store.tokens("validation").tolist()
    assert collector.labels == tokens[1:]
    if stage == "predict":
        assert sum(len(batch) for batch in results) == -(-(len(tokens) - 1) // SEQUENCE)


def test_validation_on_a_schedule(folder: Path) -> None:
    witness = Witness()
    run = trainer(folder, max_steps=70, val_check_interval=10, check_val_every_n_epoch=None)
    run.fit(witness, datamodule=datamodule(folder))
    assert witness.validated == [10, 20, 30, 40, 50, 60, 70]


def test_the_cache_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTNING_MOE_CACHE", str(tmp_path / "cache"))
    assert datamodule(folder, cache_dir=None).cache_dir == tmp_path / "cache"
    assert datamodule(folder, cache_dir="~/x").cache_dir == Path.home() / "x"
    monkeypatch.delenv("LIGHTNING_MOE_CACHE")
    assert datamodule(folder, cache_dir=None).cache_dir == Path.home() / ".cache" / "lightning_moe"


def test_a_damaged_cache_is_named_by_the_next_run(folder: Path, tmp_path: Path) -> None:
    module = ready(datamodule(folder, cache_dir=str(tmp_path)))
    path = module.store.directory / "validation-00000.tokens"
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"validation-00000\.tokens holds token \d+ at offset \d+"):
        trainer(folder, max_steps=1).fit(Witness(), datamodule=datamodule(folder, cache_dir=str(tmp_path)))


def test_configuration_by_class_path() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(TextDataModule, "data")
    defaults = parser.parse_args([])
    assert defaults.data.corpus.class_path == "lightning_moe.data.StandardLibrary"
    assert isinstance(parser.instantiate(defaults).data.corpus, StandardLibrary)
    options = ["--data.corpus=LocalFiles", "--data.corpus.paths={code: [a.py], prose: [b]}", "--data.seed=7"]
    module = parser.instantiate(parser.parse_args([*options, "--data.tokenizer.vocab_size=512"])).data
    assert module.corpus.paths == {"code": ["a.py"], "prose": ["b"]}
    assert (module.vocab_size, module.seed, module.tokenizer_config.file) == (512, 7, None)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_fragment_builds_a_datamodule(path: Path) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(TextDataModule, "data")
    parser.add_argument("--config", action="config")
    arguments = ["--config", str(path)]
    if path.stem == "local_files":
        arguments.append("--data.corpus.init_args.paths=[a.txt]")
    assert isinstance(parser.instantiate(parser.parse_args(arguments)).data, pl.LightningDataModule)
