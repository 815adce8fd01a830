"""Lightning's own callbacks, given in a configuration, work beside the run's own, also one without a list."""

from pathlib import Path

import pytest
from helpers.small_run import Command

from lightning_moe.tracking import read_metrics


@pytest.mark.parametrize(
    ("callbacks", "metric"),
    [
        ("DeviceStatsMonitor", "DeviceStatsMonitor.on_train_batch_start/cpu_percent"),
        ("[DeviceStatsMonitor]", "DeviceStatsMonitor.on_train_batch_end/cpu_percent"),
        ("LearningRateMonitor", "lr-MuonAdamW/head"),
    ],
)
def test_they_find_the_logger(command: Command, workplace: Path, callbacks: str, metric: str) -> None:
    code, _, err = command("fit", "--config", "small.yaml", "--run_name=r", f"--trainer.callbacks={callbacks}")
    assert code == 0, err
    lines = [line for line in read_metrics(workplace / "runs/r") if metric in line]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["DeviceStatsMonitor", "--trainer.fast_dev_run=true"], "trainer: Cannot use `DeviceStatsMonitor` callback"),
        (["EarlyStopping", "--trainer.callbacks.monitor=x"], "trainer: Early stopping conditioned on metric `x`"),
    ],
)
def test_what_they_refuse_is_one_line(command: Command, workplace: Path, flags: list[str], message: str) -> None:
    code, _, err = command("fit", "--config", "small.yaml", f"--trainer.callbacks={flags[0]}", *flags[1:])
    assert code == 2
    assert f"error: {message}" in err


def test_arguments_that_are_no_plain_text_are_recorded(command: Command, workplace: Path) -> None:
    """Timer has the member of an enumeration among its defaults."""
    code, _, err = command("fit", "--config", "small.yaml", "--run_name=r", "--trainer.callbacks=Timer")
    assert code == 0, err
    assert "interval: step" in (workplace / "runs/r/config.yaml").read_text()


def test_more_tasks_of_slurm_than_processes_are_refused(
    command: Command, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = {"NTASKS": "4", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_ID": "1"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    code, _, err = command("fit", "--config", "small.yaml", "--run_name=r")
    assert code == 2
    assert "error: trainer: You set `--ntasks=4`" in err
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")
    code, _, err = command("fit", "--config", "small.yaml", "--run_name=r")
    assert code == 2
    assert "trainer.devices=1 × trainer.num_nodes=1 are 1 processes, but SLURM starts SLURM_NTASKS=4" in err
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert command("fit", "--config", "small.yaml", "--run_name=r")[0] == 0
