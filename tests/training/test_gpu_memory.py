"""A device that is not there or too small is refused before the data; memory that runs out is explained by `plan`."""

import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from helpers.small_run import Command

from lightning_moe.training import gpu_memory, run

OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity …")


class RunsOut(pl.Callback):
    """As the allocator of a GPU in the second step."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: object, index: int) -> None:
        if index == 1:
            raise OOM


def gigabytes(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"(\d+\.\d\d) GB", text)]


def test_memory_that_runs_out_ends_with_one_message(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build = run.build_trainer
    monkeypatch.setattr(
        run, "build_trainer", lambda options, *rest: build({**options, "callbacks": [RunsOut()]}, *rest)
    )
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(gpu_memory, "GB", 1e3)  # of a model of kilobytes
    code, _, err = command("fit", "--config=small", "--run_name=a")
    assert code == 6
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "the memory of cpu ran out: CUDA out of memory. Tried to allocate 2.00 GiB. `plan` estimates" in line
    for switch in (
        "trainer.accumulate_grad_batches=2",
        "model.decoder.activation_checkpointing=true",
        "trainer/fsdp on 2",
    ):
        assert switch in line
    total, *smaller = gigabytes(line)
    assert smaller
    assert all(value < total for value in smaller)
    assert "Its traceback is in" in line


def test_what_is_switched_on_already_is_not_proposed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    build = run.build_trainer
    monkeypatch.setattr(
        run, "build_trainer", lambda options, *rest: build({**options, "callbacks": [RunsOut()]}, *rest)
    )
    on = ("--model.decoder.activation_checkpointing=true", "--trainer.accumulate_grad_batches=8")
    code, _, err = command("fit", "--config=small", "--run_name=a", *on)
    assert code == 6
    assert "accumulate_grad_batches=" not in err
    assert "activation_checkpointing" not in err


def memory_of(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(gpu_memory, "total_memory", lambda device: int(size))


def test_a_gpu_too_small_for_weights_and_optimizer_is_refused_before_the_data(
    command: Command, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory_of(monkeypatch, 0.05e6)
    monkeypatch.setattr(gpu_memory, "GB", 1e3)  # of a model of kilobytes
    monkeypatch.setattr("lightning_moe.data.TextDataModule.prepare_data", lambda self: pytest.fail("data was prepared"))
    code, _, err = command("fit", "--config=small", "--run_name=a")
    assert code == 2
    weights, optimizer, both, memory = gigabytes(err)
    assert weights + optimizer == pytest.approx(both, abs=0.011)
    assert both > memory == 50.0
    assert "error: model.decoder: on one GPU, weights (" in err
    assert not list(workplace.glob("runs/*"))


def test_a_gpu_too_small_for_the_rest_gives_a_warning(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    memory_of(monkeypatch, 1e6)
    with pytest.warns(UserWarning, match=r"`plan` estimates .* GB for one GPU, and this GPU has .* would take"):
        code, _, err = command("fit", "--config=small", "--run_name=a", "--trainer.max_steps=1")
    assert code == 0, err


def test_memory_that_suffices_is_not_mentioned(
    command: Command, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    memory_of(monkeypatch, 80e9)
    code, _, err = command("fit", "--config=small", "--run_name=a", "--trainer.max_steps=1")
    assert code == 0
    assert "`plan`" not in err + "".join(str(warning.message) for warning in recwarn.list)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused_in_one_line(command: Command, workplace: Path) -> None:
    code, _, err = command("fit", "--config=small", "--config=trainer/gpu")
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: trainer\.accelerator='gpu': torch \S+ .* --config trainer/cpu$", line)
    assert not list(workplace.glob("runs/*"))
