"""Runs that are killed with SIGKILL, again and again, become the run that nothing happened to, bit for bit."""

import json
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
from fault_runs import LAYOUTS, STEPS, RunFiles, Workplace, differences

AT_A_RANDOM_MOMENT = "a random moment"
Kill = tuple[str, int]  # a point of faulty_main, and at which call of it

#: each kill hits the run that goes on from what the one before has left
SHORT: list[Kill] = [("tokenisation", 1), ("before a checkpoint's name", 2), ("half a line of metrics", 3)]
ALONE: list[Kill] = [
    ("tokenisation", 1),
    ("setup", 1),
    ("between steps", 3),
    ("half a checkpoint", 1),
    ("before a checkpoint's name", 1),
    ("after a checkpoint's name", 1),
    ("rewind", 1),
    ("half a line of metrics", 1),
    ("after a line of metrics", 1),
    ("validation", 1),
    ("end of validation", 1),
    ("before the optimizer", 2),
    ("pending checkpoint", 1),
    ("after the optimizer", 4),
    ("half a checkpoint", 1),
    ("validation", 3),
    ("between steps", 4),
    (AT_A_RANDOM_MOMENT, 1),
    (AT_A_RANDOM_MOMENT, 2),
    (AT_A_RANDOM_MOMENT, 3),
    ("after a checkpoint's name", 1),
    ("end of validation", 1),
    ("summary", 1),
]
TOGETHER: list[Kill] = [
    ("tokenisation", 1),
    ("half a checkpoint", 1),
    ("after a checkpoint's name", 1),
    ("half a line of metrics", 1),
    ("validation", 1),
    ("pending checkpoint", 1),
    ("after the optimizer", 4),
    ("before a checkpoint's name", 1),
    (AT_A_RANDOM_MOMENT, 4),
    (AT_A_RANDOM_MOMENT, 5),
    ("summary", 1),
]


def kill(workplace: Workplace, point: str, call: int) -> None:
    """Start or continue the run ``killed``, and kill its process group."""
    args = ("--run_name=killed", "--ckpt_path=last")
    if point != AT_A_RANDOM_MOMENT:
        ended = workplace.fit(*args, fault={"point": point, "call": call}, cache="another cache")
    else:
        fault = {"point": "between steps", "effect": "report"}
        process = workplace.start(*args, fault=fault, cache="another cache")
        process.wait_for_fault()
        time.sleep(random.Random(call).uniform(0.0, 0.05))  # a step or two: later faults must still have steps to come
        process.kill()
        ended = process.wait()
    assert ended.code == -9, f"{point} was never reached:\n{ended.output}"


def left_and_equal(killed: RunFiles, whole: RunFiles) -> tuple[int | None, list[str]]:
    """Optimizer steps in the last checkpoint, and where checkpoint or record differ from those of the whole run."""
    checkpoint = killed.checkpoint()
    if checkpoint is None:
        return None, []
    step = checkpoint["global_step"]
    name = "last.ckpt" if step == STEPS else f"step-{step:06d}.ckpt"
    found = differences(checkpoint, whole.checkpoint(name))
    ours, theirs = killed.metrics(step), whole.metrics(step)
    # the last validation comes after the last checkpoint; a run that goes on from there makes it again
    lacks_it = step == STEPS and ours == theirs[:-1] and "val/loss" in theirs[-1]
    if ours != theirs and not lacks_it:
        found.append(f"/metrics: {ours} and {theirs}")
    return step, found


def check(workplace: Workplace, kills: list[Kill]) -> None:
    """Prints rows of a table: where it was killed, from what it went on, whether that was equal."""
    whole, killed = workplace.run("whole"), workplace.run("killed")
    assert {line["epoch"] for line in whole.metrics() if "train/loss" in line} == {0.0, 1.0}
    for point, call in kills:
        kill(workplace, point, call)
        step, found = left_and_equal(killed, whole)
        left = "the start" if step is None else f"step {step}"
        print(f"| {workplace.layout} | {point} | {left} | {found or 'equal'} |", flush=True)
        assert found == []
    workplace.check_continues("killed")
    assert summary(killed) == summary(whole)


def summary(run: RunFiles) -> dict[str, Any]:
    content = json.loads((run.folder / "summary.json").read_text())
    return {key: content[key] for key in ("loss", "perplexity", "steps", "layers", "sample")}


@pytest.mark.slow
def test_a_killed_run_becomes_the_same_run(workplace: Callable[[str], Workplace]) -> None:
    check(workplace("1 process"), SHORT)


@pytest.mark.faults
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_killed_everywhere_becomes_the_same_run(layout: str, workplace: Callable[[str], Workplace]) -> None:
    check(workplace(layout), ALONE if layout == "1 process" else TOGETHER)
