"""What is drawn from a run's record: running means, gaps, relative usage; and that what is absent is named."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.analysis import training_record
from lightning_moe.analysis.training_record import TrainingRecord, smoothed

LAYERS, TARGET = ["layer_01", "layer_02"], [1.0, 2.0]


@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=12), window=st.integers(1, 15))
def test_running_mean(values: list[float], window: int) -> None:
    expected = [
        sum(part) / len(part) for end in range(len(values)) if (part := values[max(0, end + 1 - window) : end + 1])
    ]
    assert smoothed(values, window) == pytest.approx(expected, abs=1e-9)


def write(folder: Path, lines: list[dict[str, float]]) -> TrainingRecord:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"time": 0.0, **line}) + "\n" for line in lines))
    return TrainingRecord.read(folder, LAYERS, TARGET, 3)


def test_gap_is_validation_minus_the_running_mean_up_to_it(tmp_path: Path) -> None:
    lines: list[dict[str, float]] = [{"step": step, "train/loss": 10.0 - step} for step in range(16)]
    lines += [{"step": 7, "val/loss": 5.0}, {"step": 15, "val/loss": 1.0}]
    record = write(tmp_path / "run", lines)
    section = training_record.gap_section({"run": record}, [], [])
    # 16 values: means of 2; the step in the file counts the steps before
    assert [list(row.values()) for row in section.tables["train_eval_gap"]] == [
        ["run", 8, 3.5, 5.0, 1.5],
        ["run", 16, -4.5, 1.0, 5.5],
    ]
    assert list(section.figures) == ["train_eval_gap"]


def test_gaps_that_are_close_together_are_zoomed(tmp_path: Path) -> None:
    runs = {}
    for number, gap in enumerate((0.40, 0.44)):
        lines = [{"step": 0, "train/loss": 3.0}, {"step": 0, "val/loss": 3.0 + gap}]
        runs[f"run {number}"] = write(tmp_path / str(number), lines)
    axis = training_record.gap_section(runs, [], []).figures["train_eval_gap"].axes[1]
    assert axis.get_ylim() == pytest.approx((0.3976, 0.4424))
    assert "(zoomed: 0.398 to 0.442)" in axis.get_ylabel()


def test_a_run_without_validation_is_named_and_nothing_empty_is_drawn(tmp_path: Path) -> None:
    record = write(tmp_path / "run", [{"step": 0, "train/loss": 1.0}])
    section = training_record.gap_section({"run": record}, [], ["other: not in a run's folder"])
    assert not section.figures
    assert not section.tables
    assert section.missing == ["other: not in a run's folder", "run: metrics.jsonl has no train/loss and val/loss."]
    for make in (training_record.usage_section, training_record.warmup_section, training_record.capacity_section):
        section = make({"run": record}, [])
        assert not section.figures
        assert "run: " in section.missing[0]


def test_metrics_over_training(tmp_path: Path) -> None:
    raw = {
        "routing/raw_fanout_mean": 3.0,
        "routing/layer_01/raw_fanout_mean": 1.5,
        "routing/layer_02/raw_fanout_mean": 1.0,
    }
    rates = {f"routing/{prefix}{name}": 0.25 for prefix in ("", "layer_01/", "layer_02/")
             for name in ("starvation_rate", "saturation_rate")}  # fmt: skip
    record = write(tmp_path / "run", [{"step": 4, **raw}, {"step": 9, **raw, **rates}])
    warmup = training_record.warmup_section({"run": record}, [])
    assert list(warmup.tables["warmup"]) == [
        {"run": "run", "metric": "raw_fanout_mean_relative", "step": 5, "value": 2.0},
        {"run": "run", "metric": "raw_fanout_mean_relative", "step": 10, "value": 2.0},
        {"run": "run", "metric": "starvation_rate", "step": 10, "value": 0.25},
    ]
    assert warmup.missing == ["run: not in metrics.jsonl: cutoff_deviation, logit_std, gate_std."]
    assert sum(axis.get_visible() for axis in warmup.figures["warmup"].axes) == 2  # none is empty
    capacity = training_record.capacity_section({"run": record}, [])
    of_layer = [row["value"] for row in capacity.tables["capacity"] if row["metric"] == "raw_fanout_mean_relative"]
    assert of_layer == [1.5, 1.5, 0.5, 0.5]
    assert capacity.summary[0]["starvation rate, last fifth"] == 0.25
