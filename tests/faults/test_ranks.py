"""When one of several processes fails, the others end too, instead of waiting for it; the run can be continued."""

import time
from collections.abc import Callable

import pytest
from fault_runs import Workplace


def fail(pair: Workplace, rank: int, effect: str) -> None:
    fault = {"point": "before the optimizer", "call": 2, "effect": effect, "rank": rank}
    process = pair.start("--run_name=failing", "--ckpt_path=last", fault=fault)
    process.wait_for_fault()
    began = time.monotonic()
    ended = process.wait_for_all()
    print(f"{pair.layout}, rank {rank}, {effect}: all ended after {time.monotonic() - began:.1f} s with {ended.code}")
    assert ended.code != 0
    assert ("an error on one rank" in ended.output) == (effect == "raise")
    # the line of the one that failed is not hidden among others' tracebacks
    assert ended.output.count("Its traceback is in") == (effect == "raise"), ended.output
    assert "Traceback (most recent call last)" not in ended.output
    if rank == 1:  # without the first process the others are killed at once
        assert "[rank 0] Stopping because another process of this run died" in ended.output


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all(workplace: Callable[[str], Workplace]) -> None:
    fail(workplace("DDP × 2"), 1, "raise")


@pytest.mark.faults
@pytest.mark.parametrize("layout", ["DDP × 2", "FSDP2 × 2", "expert parallel × 2"])
def test_whichever_process_fails_or_dies_all_end_and_the_run_goes_on(
    layout: str, workplace: Callable[[str], Workplace]
) -> None:
    pair = workplace(layout)
    for rank, effect in ((0, "raise"), (1, "raise"), (1, "die"), (0, "die")):
        fail(pair, rank, effect)
    pair.check_continues("failing")


@pytest.mark.faults
def test_a_run_that_diverges_on_two_processes_says_so_once(workplace: Callable[[str], Workplace]) -> None:
    args = ("--run_name=diverging", "--model.optimizer.weight_decay=1e13")
    ended = workplace("DDP × 2").start(*args).wait_for_all()
    assert ended.code == 3, ended.output
    assert ended.output.count("not finite") == 1
    assert "Traceback" not in ended.output
