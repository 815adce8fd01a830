"""The benchmark's cases compute what they say, its ratios are those of the rounds, and the command writes all files."""

import json
from pathlib import Path

import pytest
import torch

from lightning_moe.bench import cases, timing
from lightning_moe.cli.main import main

TINY = cases.Setup(hidden_size=32, num_tokens=64, num_experts=4, num_layers=2, rounds=3)


def test_ratios_are_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both cases slow down together from round to round, so their ratio does not change; a clock of our own."""
    calls: list[str] = []
    now = 0.0

    def case(name: str, factor: float) -> None:
        nonlocal now
        calls.append(name)
        now += factor * calls.count(name)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    found = timing.interleaved(
        {"one": lambda: case("one", 1), "three": lambda: case("three", 3)}, "one", 4, torch.device("cpu"), warmup=1
    )
    assert calls == ["one", "three"] * 5
    assert found["one"] == timing.Timing(3.5, 1, 1, 1)  # rounds of 2, 3, 4, 5; the first does not count
    assert found["three"] == timing.Timing(10.5, 3, 3, 3)


SLOW = ("decoding", "scaling", "overhead")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in cases.COMPARISONS]
)
def test_every_comparison_runs(name: str) -> None:
    rows = list(cases.COMPARISONS[name](TINY))
    groups = {(row.comparison, row.size) for row in rows}
    assert len(groups) == {"layer": 1, "step": 1, "decoding": 4, "scaling": 4, "overhead": 2}[name]
    assert all(row.timing.seconds > 0 for row in rows)
    if name == "layer":
        assert len(rows) == len(cases.RULES) + len(cases.ALTERNATIVES)


def test_an_alternative_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(cases.ALTERNATIVES["loop over experts"]):  # type: ignore[misc]
        def routed(self, x: torch.Tensor, mask: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
            return super().routed(x, mask, gates) * 1.01

    monkeypatch.setitem(cases.ALTERNATIVES, "wrong", Wrong)
    with pytest.raises(AssertionError, match="wrong computes something else"):
        list(cases.layer(TINY))


def test_the_layers_thresholds_select_the_target_share() -> None:
    layer = cases._layer(TINY, cases.ExpertThreshold(capacity_factor=None))
    layer(cases._input(TINY))
    assert layer.record.selection.mask.sum() == pytest.approx(64, abs=32)


def test_the_command_writes_table_json_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--hidden_size=32", "--num_tokens=64", "--num_experts=4", "--num_layers=2", "--rounds=2"]
    output = tmp_path / "out"
    assert main(["bench", "--compare", "layer", *sizes, f"--output={output}"]) == 0
    document = json.loads((output / "bench.json").read_text())
    assert len(document["rows"]) == 7
    assert document["machine"]["threads"] == torch.get_num_threads()
    assert (output / "bench.txt").read_text().strip() in capsys.readouterr().out
    assert (output / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert main(["bench", f"--output={output}"]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert main(["bench", "--device=nowhere"]) == 2
