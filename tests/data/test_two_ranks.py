"""Two real processes under Lightning's DDP: the same windows in the same order as one process, whoever resumes whom."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gloo_pair import GlooPair
from small_corpus import Window, Witness, datamodule, trainer

from lightning_moe.data import HubDataset
from lightning_moe.errors import UserError

TOTAL = 13  # into the second epoch


def fit_on_a_rank(
    folder: Path, settings: dict[str, Any], checkpoint: Path | None, save: Path | None, **data: Any
) -> dict[str, Any]:
    """What one of two ranks sees."""
    witness = Witness()
    run = trainer(folder, devices=2, strategy="ddp", **settings)
    run.fit(witness, datamodule=datamodule(folder, **data), ckpt_path=checkpoint)
    if save is not None:
        run.save_checkpoint(save)
    return {"steps": witness.steps, "weights": [p.detach() for p in witness.parameters()], "rank": run.global_rank}


def validate_on_a_rank(folder: Path, batch_size: int) -> list[list[int]]:
    seen: list[list[int]] = []

    class Collector(Witness):
        def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
            seen.append(batch["labels"].flatten().tolist())

    run = trainer(folder, devices=2, strategy="ddp", limit_val_batches=1.0)
    run.validate(Collector(), datamodule=datamodule(folder, validation_batch_size=batch_size))
    return seen


def refused_on_a_rank(folder: Path) -> str:
    try:
        trainer(folder, devices=2, strategy="ddp", max_steps=1).fit(
            Witness(), datamodule=datamodule(folder, global_batch_size=7)
        )
    except UserError as error:
        return str(error)
    return "accepted"


def merged(ranks: list[dict[str, Any]], accumulate: int, size: int = 8) -> dict[int, list[Window]]:
    """The global order of each step: micro-batch by micro-batch, rank by rank."""
    micro = size // 2 // accumulate
    return {
        step: [
            window
            for a in range(accumulate)
            for rank in ranks
            for window in rank["steps"][step][a * micro : (a + 1) * micro]
        ]
        for step in ranks[0]["steps"]
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


def alone(
    folder: Path, checkpoint: Path | None = None, save: Path | None = None, corpus: Any = None, **settings: Any
) -> Witness:
    witness = Witness()
    run = trainer(folder, **settings)
    data = {} if corpus is None else {"corpus": corpus}
    run.fit(witness, datamodule=datamodule(folder, **data), ckpt_path=checkpoint)
    if save is not None:
        run.save_checkpoint(save)
    return witness


def test_one_or_two_ranks_in_any_order(folder: Path, gloo_pair: GlooPair) -> None:
    five, nine = folder / "five.ckpt", folder / "nine.ckpt"
    reference = alone(folder, max_steps=TOTAL)
    alone(folder, max_steps=5, accumulate_grad_batches=2, save=five)

    settings = {"max_steps": 9, "accumulate_grad_batches": 2}
    pair = gloo_pair.run(fit_on_a_rank, [(folder, settings, five, nine)] * 2)
    assert [rank["rank"] for rank in pair] == [0, 1]
    assert merged(pair, 2) == {step: reference.steps[step] for step in range(5, 9)}

    witness = alone(folder, checkpoint=nine, max_steps=TOTAL, accumulate_grad_batches=4)
    assert witness.steps == {step: reference.steps[step] for step in range(9, TOTAL)}
    for resumed, expected in zip(witness.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(resumed, expected, atol=1e-5)


def test_two_ranks_across_an_epoch_from_an_empty_cache(tmp_path: Path, gloo_pair: GlooPair) -> None:
    datamodule(tmp_path)  # writes the text, prepares nothing
    pair = gloo_pair.run(fit_on_a_rank, [(tmp_path, {"max_steps": TOTAL}, None, None)] * 2)
    reference = alone(tmp_path, max_steps=TOTAL)
    assert merged(pair, 1) == reference.steps
    for ours, expected in zip(pair[0]["weights"], reference.parameters(), strict=True):
        assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_validation_token_once_over_two_ranks(folder: Path, gloo_pair: GlooPair, batch_size: int) -> None:
    ranks = gloo_pair.run(validate_on_a_rank, [(folder, batch_size)] * 2)
    assert [len(batch) for batch in ranks[0]] == [len(batch) for batch in ranks[1]]
    module = datamodule(folder)
    module.setup("validate")
    expected = module.store.tokens("validation").tolist()[1:]
    labels = [label for rank in ranks for batch in rank for label in batch if label != -100]
    assert sorted(labels) == sorted(expected)


def test_a_batch_that_two_ranks_cannot_share(folder: Path, gloo_pair: GlooPair) -> None:
    for message in gloo_pair.run(refused_on_a_rank, [(folder,)] * 2):
        assert "global_batch_size=7" in message
        assert "2 ranks" in message


def stream_on_a_rank(folder: Path, corpus: HubDataset, checkpoint: Path) -> dict[str, Any]:
    return fit_on_a_rank(folder, {"max_steps": 12}, checkpoint, None, corpus=corpus)


def test_a_stream_is_continued_by_two_ranks(folder: Path, tmp_path: Path, gloo_pair: GlooPair) -> None:
    datamodule(folder)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_bytes((folder / "corpus.jsonl").read_bytes())
    corpus = HubDataset(str(tmp_path / "text"), streaming=True)
    reference = alone(folder, corpus=corpus, max_steps=12)
    alone(folder, corpus=corpus, max_steps=5, accumulate_grad_batches=2, save=tmp_path / "five.ckpt")
    pair = gloo_pair.run(stream_on_a_rank, [(folder, corpus, tmp_path / "five.ckpt")] * 2)
    assert merged(pair, 1) == {step: reference.steps[step] for step in range(5, 12)}
