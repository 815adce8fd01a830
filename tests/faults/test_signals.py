"""A run that is asked to stop saves at once, says so, ends with its own exit code, and continues bit for bit."""

import os
import signal
from collections.abc import Callable

import pytest
from fault_runs import LAYOUTS, STEPS, Workplace

TOGETHER = [layout for layout in LAYOUTS if layout != "1 process"]
RARELY = "--checkpoint.every_n_train_steps=100"


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "point", "call", "code", "message"),
    [
        ("SIGTERM", "before the optimizer", 5, 143, "SIGTERM after 5 steps"),
        ("SIGUSR1", "validation", 5, 143, "SIGUSR1 after 8 steps"),
        ("SIGINT", "between steps", 6, 130, "Ctrl-C after 3 steps"),  # between the micro-batches of the third
    ],
)
def test_a_signal_stops_at_the_step_or_in_the_validation(
    name: str, point: str, call: int, code: int, message: str, workplace: Callable[[str], Workplace]
) -> None:
    alone = workplace("1 process")
    ended = alone.fit(f"--run_name={name}", RARELY, fault={"point": point, "call": call, "effect": name})
    assert ended.code == code, ended.output
    last = alone.run(name).folder / "checkpoints/last.ckpt"
    assert f"stopped by {message}; the checkpoint is {last}. Continue with --ckpt_path last" in ended.output
    assert "Traceback" not in ended.output
    alone.check_continues(name)


@pytest.mark.faults
@pytest.mark.parametrize(("point", "call"), [("validation", 10), ("summary", 1)])
def test_after_the_last_step_sigterm_ends_the_process(
    point: str, call: int, workplace: Callable[[str], Workplace]
) -> None:
    """Nothing is lost by it: the last checkpoint is written."""
    alone = workplace("1 process")
    ended = alone.fit(f"--run_name={point}", fault={"point": point, "call": call, "effect": "SIGTERM"})
    assert ended.code == -15, ended.output
    checkpoint = alone.run(point).checkpoint()
    assert checkpoint is not None
    assert checkpoint["global_step"] == STEPS
    alone.check_continues(point)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("DDP × 2", marks=pytest.mark.slow),
        *(pytest.param(layout, marks=pytest.mark.faults) for layout in TOGETHER if layout != "DDP × 2"),
    ],
)
def test_a_signal_to_the_group_stops_all_processes_at_one_step(
    layout: str, workplace: Callable[[str], Workplace]
) -> None:
    pair = workplace(layout)
    fault = {"point": "validation", "call": 2, "effect": "SIGTERM", "rank": 1}
    ended = pair.fit("--run_name=group", RARELY, fault=fault)
    assert ended.code == 143, ended.output
    assert ended.output.count("stopped by SIGTERM after 4 steps") == 1, ended.output
    pair.check_continues("group")


@pytest.mark.faults
@pytest.mark.parametrize("layout", TOGETHER)
def test_a_signal_to_the_first_process_stops_all(layout: str, workplace: Callable[[str], Workplace]) -> None:
    pair = workplace(layout)
    process = pair.start("--run_name=first", RARELY, fault={"point": "between steps", "effect": "report"})
    process.wait_for_fault()
    os.kill(process.process.pid, signal.SIGTERM)
    ended = process.wait_for_all()
    assert ended.code == 143, ended.output
    stopped = pair.run("first").checkpoint()
    assert stopped is not None
    assert 1 <= stopped["global_step"] < STEPS
    pair.check_continues("first")
