"""The GPU's suite on the CPU at tiny sizes: every case gives numbers, an error is a row, and time has an end."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import gpu_cases, measurement, setup, suite
from benchmarks.suite import Case, Result, run_cases
from lightning_moe.cli.main import report_errors

CPU = torch.device("cpu")
TINY = ["--hidden_size=32", "--num_tokens=64", "--sequence_length=32", "--num_experts=4", "--num_layers=2"]
TINY += ["--vocab_size=64", "--rounds=2"]
AT = setup.Setup(
    hidden_size=32, num_tokens=64, sequence_length=32, num_experts=4, num_layers=2, vocab_size=64, rounds=2
)


def fail(error: Exception) -> Mapping[str, float]:
    raise error


def test_an_error_is_a_row_and_the_next_case_runs() -> None:
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")
    cases = [
        Case("group", "memory", lambda: fail(memory)),
        Case("group", "bug", lambda: fail(KeyError("name"))),
        Case("group", "works", lambda: {"milliseconds": 1.5, "peak_bytes": 2e9, "waits": 3, "mfu": 0.25}),
    ]
    results = list(run_cases(cases, 60, CPU))
    assert [result.error for result in results] == [
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.",
        "KeyError: 'name'",
        None,
    ]
    assert suite.line(results[2]).startswith("group: works: ms 1.500, peak GB 2.00, waits 3, MFU 25.0% (")
    lines = suite.table(results).splitlines()
    assert lines[0].split() == ["group", "case", "ms", "tokens/s", "MFU", "peak", "GB", "waits", "launches"]
    assert lines[1].endswith("Tried to allocate 2 GiB.")
    assert json.loads(suite.document(results, {"a": 1}))["results"][2]["values"]["waits"] == 3


def test_cases_after_the_last_second_are_rows_that_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def work() -> Mapping[str, float]:
        nonlocal now
        now += 40
        return {"milliseconds": 1.0}

    monkeypatch.setattr(suite.time, "monotonic", lambda: now)
    results = list(run_cases([Case("g", str(number), work) for number in range(4)], 60, CPU))
    assert [result.seconds for result in results] == [40, 40, 0, 0]
    assert [result.error for result in results[2:]] == ["left out: --max_seconds 60 are over"] * 2


def test_launches_are_the_operations_that_call_no_others() -> None:
    x = torch.ones(4, 4)
    one = measurement.launches(lambda: x.add(x), CPU)
    assert one == 1
    assert measurement.launches(lambda: x.add(x).add(x).add(x), CPU) == 3 * one
    assert measurement.launches(lambda: torch.nn.functional.linear(x, x), CPU) >= 1
    assert measurement.launches(lambda: None, CPU) == 0


@pytest.mark.parametrize("group", ["layer", "step small", "around the step", "decoding"])
def test_eager_cases_measure(group: str) -> None:
    sizes = gpu_cases.Sizes(AT, replace(AT, num_layers=3))
    eager = [case for case in gpu_cases.cases(sizes) if case.group == group and "compiled" not in case.name]
    eager = [case for case in eager if case.name != "one dense layer, head and loss"]  # compiled, too
    assert eager
    for result in run_cases(eager, 600, CPU):
        assert result.error is None, result
        assert result.values["milliseconds"] > 0
        assert group == "decoding" or result.values["launches"] > 0


def test_names_of_cases_are_different() -> None:
    names = [(case.group, case.name) for case in gpu_cases.cases(gpu_cases.Sizes(AT, AT))]
    assert len(set(names)) == len(names) > 25


def test_without_a_gpu_the_suite_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert report_errors(lambda: command.run(["--suite", "gpu"])) == 2
    assert "error: --device cuda: " in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_suite_runs_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--suite", "gpu", "--device", "cpu", "--max_seconds", "3600", "--output_dir", str(tmp_path / "out"), *TINY]
    assert report_errors(lambda: command.run(asked)) == 0
    results = [Result(**row) for row in json.loads((tmp_path / "out/bench.json").read_text())["results"]]
    assert [result for result in results if result.error] == []
    steps = [result for result in results if result.group.startswith("step")]
    assert all(result.values["tokens_per_second"] > 0 for result in steps)
    assert (tmp_path / "out/bench.txt").read_text().strip() in capsys.readouterr().out
