"""A PostgreSQL that goes away while a sweep runs: the real server, stopped and started again."""

import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from helpers.postgres_server import PostgresServer
from small_sweep import DECAY, Make, processes_of, start_process, wait_for

from lightning_moe.errors import UserError
from lightning_moe.sweep import locks
from lightning_moe.sweep.locks import FIRST_TRIAL, LEADER, PostgresLocks
from lightning_moe.sweep.main import run_sweep
from lightning_moe.sweep.optuna_study import open_optuna_study
from lightning_moe.sweep.spec import Sweep

pytestmark = pytest.mark.slow
STEPS = 200  # four seconds


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


def long_sweep(make: Make, postgres: PostgresServer, name: str, steps: int = STEPS, **changes: Any) -> Sweep:
    config = [{"tracking.enabled": False, "trainer.max_steps": steps}]
    return make(name=name, storage=postgres.url, config=config, **changes)


def runs(sweep: Sweep, number: int) -> tuple[list[str], int]:
    """From which steps a trial's run was started, and how often it came to its end."""
    folder = sweep.folder / f"trial-{number:04d}-s1"
    ends = folder / "ends"
    return (folder / "starts").read_text().split(), ends.read_text().count("end") if ends.exists() else 0


def end_holder(postgres: PostgresServer, number: int) -> None:
    """End the session that has a lock."""
    with psycopg.connect(postgres.url) as connection:
        held = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted AND objid = %s"
        assert connection.execute(held, (number,)).fetchall() == [(True,)]


def test_runs_go_on_while_the_server_is_away(make: Make, postgres: PostgresServer) -> None:
    pruner = {"name": "ThresholdPruner", "upper": 1000.0}  # which has every step reported
    sweep = long_sweep(make, postgres, "outage", budget={"trials": 4}, pruner=pruner)
    processes = [start_process(sweep), start_process(sweep)]
    wait_for(lambda: len(list(sweep.folder.glob("trial-000[01]-s1/checkpoints/last.ckpt"))) == 2)
    postgres.stop()
    wait_for(lambda: runs(sweep, 0)[1] == runs(sweep, 1)[1] == 1)  # they end while nobody can be told
    time.sleep(1)
    postgres.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    trials = open_optuna_study(sweep).optuna_study.get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 4
    assert [runs(sweep, number) for number in range(4)] == [(["0"], 1)] * 4  # none was started twice
    for trial in trials:
        assert trial.value == pytest.approx((trial.params[DECAY] - 0.9) ** 2 + 0.001 + 1 / STEPS)
    for trial in trials[:2]:
        assert set(trial.intermediate_values) == set(range(1, STEPS + 1))


def test_a_server_that_stays_away_ends_the_sweep_and_a_new_start_goes_on(
    make: Make, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = long_sweep(make, postgres, "away", budget={"trials": 2})
    with monkeypatch.context() as patch:
        patch.setattr(PostgresLocks, "patience", 1.0)
        process = start_process(sweep)
        wait_for((sweep.folder / "trial-0000-s1/checkpoints/last.ckpt").exists)
        postgres.stop()
        process.join(60)
    assert process.exitcode not in (None, 0)
    assert processes_of(sweep.folder) == []
    with pytest.raises(
        UserError, match=r"storage='postgresql://sweeper:\*\*\*@127.0.0.1:\d+/postgres': cannot be reached"
    ):
        run_sweep(sweep)
    postgres.start()
    run_sweep(sweep)
    states = [trial.state.name for trial in open_optuna_study(sweep).optuna_study.get_trials()]
    assert states == ["COMPLETE"] * 2


def test_locks_are_taken_again_unless_somebody_was_faster(postgres: PostgresServer) -> None:
    mine, others = PostgresLocks(postgres.url, "locks"), PostgresLocks(postgres.url, "locks")
    for number in (LEADER, 5, 6, 7):
        mine.lock(number)
    assert mine.renew([LEADER, 5, 6]) == set()  # the connection is alive: the others see no gap
    assert not mine.in_grace_period()
    assert [others.try_lock(number) for number in (LEADER, 5, 6, 7)] == [False, False, False, True]
    assert others.holder(5) == f"process {os.getpid()} on {socket.gethostname()}"
    assert others.holder(8) == "another process"  # that nobody has it any more
    end_holder(postgres, 5)
    with pytest.raises(ConnectionError):
        mine.try_lock(8)
    assert others.try_lock(6)
    assert mine.renew([LEADER, 5, 6]) == {6}
    assert mine.in_grace_period()  # what seems abandoned now may belong to a process that is still coming back
    assert [others.try_lock(number) for number in (LEADER, 5, 8)] == [False, False, True]


def test_a_process_that_starts_with_the_server_lets_the_others_come_back(postgres: PostgresServer) -> None:
    started = time.monotonic()
    postgres.stop()
    postgres.start()
    fresh = PostgresLocks(postgres.url, "fresh")
    delay = fresh.grace_after_server_start()
    assert locks.GRACE_SECONDS - (time.monotonic() - started) - 1 < delay <= locks.GRACE_SECONDS


def test_a_trial_that_another_process_took_up_is_left_to_it(
    make: Make, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "GRACE_SECONDS", 3.0)
    sweep = long_sweep(make, postgres, "taken", steps=1000, budget={"trials": 1})
    process = start_process(sweep)
    wait_for((sweep.folder / "trial-0000-s1/checkpoints/last.ckpt").exists)
    other = PostgresLocks(postgres.url, "taken")
    assert not other.try_lock(FIRST_TRIAL)
    end_holder(postgres, FIRST_TRIAL)
    wait_for(lambda: other.try_lock(FIRST_TRIAL))
    wait_for(lambda: processes_of(sweep.folder) == [])
    starts, ends = runs(sweep, 0)
    assert (starts, ends) == (["0"], 0)
    other.close()  # and it dies
    process.join()
    assert process.exitcode == 0
    starts, ends = runs(sweep, 0)
    assert (len(starts), ends) == (2, 1)
    assert int(starts[1]) > 0
