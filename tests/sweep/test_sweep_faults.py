"""Sweeps whose processes are killed at random, on every kind of storage."""

import contextlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import yaml
from helpers.postgres_server import PostgresServer
from small_sweep import DECAY, Make, processes_of, start_process, wait_for

from lightning_moe.sweep.main import run_sweep
from lightning_moe.sweep.optuna_study import open_optuna_study
from lightning_moe.sweep.pool import RUN_FOLDER_VARIABLE

pytestmark = pytest.mark.slow
KILLS = {"sqlite": 10, "journal": 2, "postgresql": 3}
STEPS = 50


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


def running(folder: Path, processes: list[Any]) -> int | None:
    """Return which of the processes has a run that has begun; `None` for none."""
    for pid in processes_of(folder):
        with contextlib.suppress(psutil.Error):
            run = psutil.Process(pid)
            begun = (Path(run.environ()[RUN_FOLDER_VARIABLE]) / "starts").exists()
            ancestors = {parent.pid for parent in run.parents()}
            if begun:
                return next((i for i, process in enumerate(processes) if process.pid in ancestors), None)
    return None


@pytest.mark.parametrize("storage", ["sqlite", "journal", "postgresql"])
def test_killed_at_random_every_trial_completes_exactly_once(
    storage: str, make: Make, postgres: PostgresServer, tmp_path: Path
) -> None:
    url = {
        "sqlite": f"sqlite:///{tmp_path}/sweeps.db",
        "journal": f"journal:///{tmp_path}/sweeps.journal",
        "postgresql": postgres.url,
    }[storage]
    kills = int(os.environ.get("LIGHTNING_MOE_TEST_KILLS", KILLS[storage]))
    config = [{"tracking.enabled": False, "trainer.max_steps": STEPS}]
    sweep = make(name="faults", storage=url, config=config, budget={"trials": kills + 4})
    chance = random.Random(1)
    processes = [start_process(sweep), start_process(sweep)]
    for kill in range(kills):
        wait_for(lambda number=kill: len(list(sweep.folder.glob("trial-*-s1/starts"))) > number)
        if kill == 0:  # in the middle of a run, so that one is continued for certain
            wait_for(lambda: running(sweep.folder, processes) is not None)
            victim = running(sweep.folder, processes)
            assert victim is not None
        else:
            time.sleep(chance.uniform(0, 2))  # a run takes one second
            victim = chance.randrange(2)
        assert processes[victim].is_alive()
        processes[victim].kill()
        processes[victim].join()
        processes[victim] = start_process(sweep)
    for process in processes:
        process.join()
    assert processes_of(sweep.folder) == []

    trials = open_optuna_study(sweep).optuna_study.get_trials()
    assert [trial.state for trial in trials] == [optuna.trial.TrialState.COMPLETE] * (kills + 4)
    assert len({trial.params[DECAY] for trial in trials}) == kills + 4
    continued = 0
    for trial in trials:
        folder = sweep.folder / f"trial-{trial.number:04d}-s1"
        starts = [int(start) for start in (folder / "starts").read_text().split()]
        assert (folder / "ends").read_text().split() == ["end"]
        assert starts == sorted(starts)  # each from the checkpoint of the one before
        continued += len(starts) > 1
        assert trial.value == pytest.approx((trial.params[DECAY] - 0.9) ** 2 + 0.001 + 1 / STEPS)
    assert continued > 0


def test_two_machines_share_a_study_over_postgresql(make: Make, postgres: PostgresServer) -> None:
    content = {"name": "shared", "storage": postgres.url, "budget": {"trials": 6}}
    content["config"] = [{"tracking.enabled": False, "trainer.max_steps": 15}]
    here, there = make(output_dir="here", **content), make(output_dir="there", **content)
    process = start_process(there)
    run_sweep(here)
    process.join()
    assert process.exitcode == 0
    trials = open_optuna_study(here).optuna_study.get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 6
    ran = [len(list(sweep.folder.glob("trial-*-s1/ends"))) for sweep in (here, there)]
    assert sum(ran) == 6
    assert min(ran) >= 1
    # one process keeps the record; the other may take over when that one ends first
    found = [path for sweep in (here, there) for path in sweep.folder.glob("best_config.yaml")]
    decays = {yaml.safe_load(path.read_text())["model"]["routing"]["init_args"]["ema_decay"] for path in found}
    assert decays == {min(trials, key=lambda trial: trial.value).params[DECAY]}
