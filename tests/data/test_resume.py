"""Interrupt a real Trainer, resume, and compare every window and every weight with a run that never stopped."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from small_corpus import Stop, Witness, datamodule, ready, trainer

from lightning_moe.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:.*ckpt_path"),
]

STEPS_PER_EPOCH = 10  # checked below
TOTAL = 2 * STEPS_PER_EPOCH + 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    module = ready(datamodule(folder))
    assert len(module.train_dataloader()) == STEPS_PER_EPOCH
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> dict[int, Witness]:
    """By accumulation."""
    runs = {}
    for accumulate in (1, 4):
        runs[accumulate] = Witness()
        fit = trainer(folder, max_steps=TOTAL, accumulate_grad_batches=accumulate)
        fit.fit(runs[accumulate], datamodule=datamodule(folder))
    return runs


def resume(folder: Path, checkpoint: Path, accumulate: int, workers: int = 0) -> Witness:
    witness = Witness()
    fit = trainer(folder, max_steps=TOTAL, accumulate_grad_batches=accumulate)
    fit.fit(witness, datamodule=datamodule(folder, num_workers=workers), ckpt_path=checkpoint, weights_only=True)
    return witness


def assert_continues(witness: Witness, reference: Witness, step: int) -> None:
    assert witness.steps == {s: windows for s, windows in reference.steps.items() if s >= step}
    for resumed, expected in zip(witness.parameters(), reference.parameters(), strict=True):
        assert torch.equal(resumed, expected)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("step", [1, 5, STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1, 2 * STEPS_PER_EPOCH])
def test_killed_after_a_step_checkpoint(
    folder: Path, tmp_path: Path, uninterrupted: dict[int, Witness], step: int, accumulate: int
) -> None:
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit = trainer(folder, max_steps=TOTAL, accumulate_grad_batches=accumulate, callbacks=[checkpoints])
    with pytest.raises(Stop):
        fit.fit(Witness(die_in_batch=step * accumulate + 1), datamodule=datamodule(folder))
    witness = resume(folder, tmp_path / f"step={step}.ckpt", accumulate)
    assert_continues(witness, uninterrupted[accumulate], step)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("step", [3, STEPS_PER_EPOCH])
def test_stopped_by_max_steps(
    folder: Path, tmp_path: Path, uninterrupted: dict[int, Witness], step: int, accumulate: int
) -> None:
    fit = trainer(folder, max_steps=step, accumulate_grad_batches=accumulate)
    fit.fit(Witness(), datamodule=datamodule(folder))
    fit.save_checkpoint(tmp_path / "stopped.ckpt")
    assert_continues(resume(folder, tmp_path / "stopped.ckpt", accumulate), uninterrupted[accumulate], step)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_checkpoint_at_the_end_of_an_epoch(
    folder: Path, tmp_path: Path, uninterrupted: dict[int, Witness], accumulate: int
) -> None:
    checkpoints = ModelCheckpoint(tmp_path, filename="end", save_on_train_epoch_end=True)
    fit = trainer(folder, max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[checkpoints])
    fit.fit(Witness(), datamodule=datamodule(folder))
    witness = resume(folder, tmp_path / "end.ckpt", accumulate)
    assert_continues(witness, uninterrupted[accumulate], STEPS_PER_EPOCH)


@pytest.mark.parametrize("batch", [4 * 3 + 2, 4 * STEPS_PER_EPOCH, 4 * STEPS_PER_EPOCH + 1])
def test_killed_inside_a_step(folder: Path, tmp_path: Path, uninterrupted: dict[int, Witness], batch: int) -> None:
    """The unfinished step is done again from its first micro-batch."""
    fit = trainer(
        folder, max_steps=TOTAL, accumulate_grad_batches=4, callbacks=[OnExceptionCheckpoint(tmp_path, "died")]
    )
    with pytest.raises(Stop):
        fit.fit(Witness(die_in_batch=batch), datamodule=datamodule(folder))
    assert_continues(resume(folder, tmp_path / "died.ckpt", 4), uninterrupted[4], batch // 4)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_checkpoint_in_validation(folder: Path, tmp_path: Path, accumulate: int) -> None:
    """Validation each 6 batches: with 4 micro-batches a step every second one is in the middle of a step."""
    every = {"val_check_interval": 6, "check_val_every_n_epoch": None, "accumulate_grad_batches": accumulate}
    reference = Witness()
    trainer(folder, max_steps=TOTAL, **every).fit(reference, datamodule=datamodule(folder))
    assert reference.validated == [6 * i // accumulate for i in range(1, TOTAL * accumulate // 6 + 1)]

    checkpoints = ModelCheckpoint(
        tmp_path, filename="{step}", save_on_train_epoch_end=False, every_n_epochs=1, save_top_k=-1
    )
    fit = trainer(folder, max_steps=TOTAL, callbacks=[checkpoints], **every)
    fit.fit(Witness(), datamodule=datamodule(folder))
    for step in reference.validated[:3]:
        witness = Witness()
        fit = trainer(folder, max_steps=TOTAL, **every)
        fit.fit(witness, datamodule=datamodule(folder), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_continues(witness, reference, step)
        later = [s for s in reference.validated if s > step]
        assert witness.validated in (later, [step, *later])  # in mid-step it goes back, and validates again


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 1)])
@pytest.mark.parametrize("step", [3, STEPS_PER_EPOCH])
def test_another_accumulation_keeps_the_order(
    folder: Path, tmp_path: Path, uninterrupted: dict[int, Witness], step: int, before: int, after: int
) -> None:
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=step, save_top_k=-1)
    fit = trainer(folder, max_steps=step + 2, accumulate_grad_batches=before, callbacks=[checkpoints])
    fit.fit(Witness(), datamodule=datamodule(folder))
    witness = resume(folder, tmp_path / f"step={step}.ckpt", after)
    assert witness.steps == {s: windows for s, windows in uninterrupted[1].steps.items() if s >= step}


def test_workers_that_run_ahead(folder: Path, tmp_path: Path, uninterrupted: dict[int, Witness]) -> None:
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit = trainer(folder, max_steps=TOTAL, accumulate_grad_batches=4, callbacks=[checkpoints])
    with pytest.raises(Stop):
        fit.fit(Witness(die_in_batch=30), datamodule=datamodule(folder, num_workers=2))
    witness = resume(folder, tmp_path / "step=5.ckpt", 4, workers=2)
    assert_continues(witness, uninterrupted[4], 5)


def test_another_batch_size_goes_on_in_the_same_order(
    folder: Path, tmp_path: Path, uninterrupted: dict[int, Witness]
) -> None:
    fit = trainer(folder, max_steps=5)
    fit.fit(Witness(), datamodule=datamodule(folder))
    fit.save_checkpoint(tmp_path / "five.ckpt")
    witness = Witness()
    module = datamodule(folder, global_batch_size=4)
    trainer(folder, max_steps=9).fit(witness, datamodule=module, ckpt_path=tmp_path / "five.ckpt")
    order = [window for step in sorted(uninterrupted[1].steps) for window in uninterrupted[1].steps[step]]
    assert [w for step in sorted(witness.steps) for w in witness.steps[step]] == order[40:56]
    assert module.position == 56


def test_every_window_once_a_pass(folder: Path, uninterrupted: dict[int, Witness]) -> None:
    """The passes follow each other without a gap, whether or not the batch size divides them."""
    module = ready(datamodule(folder))
    tokens = module.store.tokens("train").tolist()
    windows = [tuple(tokens[i : i + 16]) for i in range(0, len(tokens) - 16, 16)]
    order = [w for step in sorted(uninterrupted[1].steps) for w in uninterrupted[1].steps[step]]
    assert len(windows) % 8
    assert sorted(order[: len(windows)]) == sorted(windows)
    assert sorted(order[len(windows) : 2 * len(windows)]) == sorted(windows)
    assert order[: len(windows)] != order[len(windows) : 2 * len(windows)]


def test_a_limited_epoch_goes_on_with_new_windows(folder: Path, uninterrupted: dict[int, Witness]) -> None:
    witness = Witness()
    trainer(folder, max_epochs=3, limit_train_batches=4).fit(witness, datamodule=datamodule(folder))
    assert witness.steps == {step: uninterrupted[1].steps[step] for step in range(12)}


@pytest.fixture(scope="module")
def checkpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    fit = trainer(folder, max_steps=2)
    fit.fit(Witness(), datamodule=datamodule(folder))
    path = tmp_path_factory.mktemp("refused") / "two.ckpt"
    fit.save_checkpoint(path)
    return path


def test_other_data_are_refused(folder: Path, checkpoint: Path) -> None:
    module, original = datamodule(folder, sequence_length=8), ready(datamodule(folder))
    with pytest.raises(UserError, match="sequence_length: 16 → 8") as caught:
        trainer(folder, max_steps=4).fit(Witness(), datamodule=module, ckpt_path=checkpoint)
    assert module.fingerprint in str(caught.value)
    assert original.fingerprint in str(caught.value)


def test_another_order_is_refused(folder: Path, checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"data\.seed=2.*seed 1"):
        trainer(folder, max_steps=4).fit(Witness(), datamodule=datamodule(folder, seed=2), ckpt_path=checkpoint)


def test_other_data_may_be_validated_but_not_with_another_tokenizer(folder: Path, checkpoint: Path) -> None:
    trainer(folder).validate(Witness(), datamodule=datamodule(folder, sequence_length=8), ckpt_path=checkpoint)
    other = datamodule(folder, validation_fraction=0.4)  # another training split, so other merges
    with pytest.raises(UserError, match="tokenizer: "):
        trainer(folder).validate(Witness(), datamodule=other, ckpt_path=checkpoint)
