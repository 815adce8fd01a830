"""Comparison of runs: statistics against a table and slow sums, grouping, refusals, and the command."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.cli import main
from lightning_moe.compare.groups import check_comparable, find_group, group
from lightning_moe.compare.runs import FinishedRun, read_folders
from lightning_moe.compare.statistics import estimate, paired_difference
from lightning_moe.errors import UserError

#: 97.5% quantile of Student's t by degrees of freedom, as printed in textbooks
T_TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 29: 2.045}


@pytest.mark.parametrize(("freedom", "quantile"), T_TABLE.items())
def test_the_interval_is_the_textbook_s(freedom: int, quantile: float) -> None:
    values = [math.sin(i) for i in range(freedom + 1)]
    n = len(values)
    mean = sum(values) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    found = estimate(values)
    assert found.mean == pytest.approx(mean)
    assert found.half_width == pytest.approx(quantile * deviation / math.sqrt(n), rel=2e-4)
    assert found.count == n


def test_one_value_has_no_interval() -> None:
    found = estimate([3.0])
    assert (found.mean, found.half_width, found.excludes_zero) == (3.0, None, None)


@given(
    st.dictionaries(st.integers(0, 9), st.floats(-5, 5), min_size=2),
    st.dictionaries(st.integers(0, 9), st.floats(-5, 5), min_size=2),
    st.floats(-3, 3),
)
def test_pairs_by_seed_take_out_what_seeds_share(a: dict[int, float], b: dict[int, float], shift: float) -> None:
    found = paired_difference(a, b)
    common = set(a) & set(b)
    assert (found is None) == (not common)
    if found is not None:
        assert found.count == len(common)
        assert found.mean == pytest.approx(sum(a[s] - b[s] for s in common) / len(common), abs=1e-9)
    moved = paired_difference({seed: value + shift for seed, value in a.items()}, a)
    assert moved is not None
    assert moved.mean == pytest.approx(shift, abs=1e-9)
    assert moved.half_width == pytest.approx(0, abs=1e-6)


def config(routing: str | None = "TokenChoice", seed: int = 1, **changes: Any) -> dict[str, Any]:
    rule = {"class_path": f"lightning_moe.routing.{routing}", "init_args": {"ema_decay": changes.pop("ema_decay", 0.9)}}
    return {
        "seed_everything": seed,
        "output_dir": "runs",
        "model": {"routing": rule if routing else None, "optimizer": {"muon_lr": changes.pop("lr", 0.02)}},
        "data": {"seed": seed, "validation_batch_size": 16},
        "trainer": {"limit_val_batches": changes.pop("limit", None), "devices": 1},
        "tracking": {"tags": {"trial": str(seed)}},
    }


def summary(loss: float, **changes: Any) -> dict[str, Any]:
    data = {"fingerprint": "f1", "tokenizer": "t1", "validation_documents": 3, "validation_tokens": 900}
    data |= {"validation_bytes": 2700} | changes.pop("data", {})
    layers = {"layer_01": {"max_load": 1.5, "fanout_mean": 0.5}, "layer_02": {"max_load": 2.5, "fanout_mean": 1.0}}
    values = {"loss": loss, "bits_per_byte": loss / 2, "layers": layers, "flops_per_token": 6000, "train_tokens": 4096}
    values |= {"world_size": 1, "micro_batch_size": 8, "segments": []}
    return values | {"tokens_per_second": 100.0, "data": data} | changes


SUMMARY_KEYS = ("data", "train_tokens", "layers", "world_size", "micro_batch_size", "segments")


def run(loss: float = 1.0, seed: int = 1, routing: str | None = "TokenChoice", **changes: Any) -> FinishedRun:
    of_summary = {key: changes.pop(key) for key in SUMMARY_KEYS if key in changes}
    return FinishedRun(f"run-{routing}-{seed}", config(routing, seed, **changes), summary(loss, **of_summary))


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("fingerprint", run(data={"fingerprint": "f2"}), r'data fingerprint: "f1" in run-TokenChoice-1; "f2" in'),
        ("tokenizer", run(data={"tokenizer": "t2"}), 'tokenizer: "t1" in .*; "t2" in'),
        ("validation", run(data={"validation_tokens": 901}), r"validation set .*: \[3, 900, 2700, null\] in"),
        ("validation", run(limit=2), r"\[3, 900, 2700, \[2, 16\]\] in"),
        ("budget", run(train_tokens=8192), r"budget \(training tokens\): 4096 in .*; 8192 in"),
    ],
)
def test_runs_that_do_not_compare_are_refused(name: str, other: FinishedRun, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_comparable([run(), other])
    assert f"--allow {name}" in str(caught.value)
    (note,) = check_comparable([run(), other], [name])
    assert re.search(message, note)
    assert check_comparable([run(), run(seed=2)]) == []


def test_groups_differ_in_more_than_the_seed_and_are_named_by_it() -> None:
    runs = [run(seed=seed, routing=rule) for rule in ("TokenChoice", None) for seed in (1, 2)]
    runs += [run(seed=1, routing="ExpertThreshold", ema_decay=decay) for decay in (0.9, 0.99)]
    groups, notes = group(runs)
    assert [(one.label, sorted(one.runs)) for one in groups] == [
        ("token_choice", [1, 2]),
        ("dense", [1, 2]),
        ("expert_threshold (ema_decay=0.9)", [1]),
        ("expert_threshold (ema_decay=0.99)", [1]),
    ]
    assert notes == []
    assert find_group(groups, "den").label == "dense"
    with pytest.raises(UserError, match="several groups begin so"):
        find_group(groups, "expert")
    with pytest.raises(UserError, match="did you mean 'token_choice'"):
        find_group(groups, "token_choce")


def test_other_pools_are_another_group() -> None:
    """Two processes, or smaller micro-batches, choose among other tokens."""
    groups, _ = group([run(), run(world_size=2, micro_batch_size=4), run(micro_batch_size=4)])
    assert [one.label for one in groups] == [
        "token_choice (world_size=1, micro_batch_size=8)",
        "token_choice (world_size=2, micro_batch_size=4)",
        "token_choice (world_size=1, micro_batch_size=4)",
    ]


@pytest.mark.parametrize(
    "trainer",
    [
        {"val_check_interval": 50},
        {"profiler": "simple"},
        {"accumulate_grad_batches": 2},
        {"callbacks": [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor", "init_args": {}}]},
        {"callbacks": [{"class_path": "lightning.pytorch.callbacks.DeviceStatsMonitor"}]},
    ],
)
def test_what_only_looks_on_makes_no_other_group(trainer: dict[str, Any]) -> None:
    one, other = run(seed=1), run(seed=2)
    other.config["trainer"].update(trainer)
    assert [sorted(found.runs) for found in group([one, other])[0]] == [[1, 2]]


def test_a_callback_that_may_train_makes_another_group() -> None:
    one, other = run(seed=1), run(seed=2)
    other.config["trainer"]["callbacks"] = [{"class_path": "lightning.pytorch.callbacks.StochasticWeightAveraging"}]
    assert len(group([one, other])[0]) == 2


def test_a_setting_that_changed_on_the_way_shows_its_history() -> None:
    parts = [{"step": 2, "changed": {"model.optimizer.muon_lr": [0.02, 0.01]}}]
    parts += [{"step": 5, "changed": {"model.optimizer.muon_lr": [0.01, 0.03]}}]
    labels = [one.label for one in group([run(lr=0.03), run(lr=0.03, segments=parts)])[0]]
    assert labels == [
        "token_choice (muon_lr=0.03)",
        "token_choice (muon_lr=0.02, from step 2: 0.01, from step 5: 0.03)",
    ]


def test_labels_are_short_and_different() -> None:
    decays = (0.9, 1 / 3, None, 0.1234567, 0.1234568)
    groups, _ = group([run(routing="ExpertThreshold", ema_decay=decay) for decay in decays])
    labels = [one.label for one in groups]
    assert labels[:3] == [f"expert_threshold (ema_decay={text})" for text in ("0.9", "0.3333", "none")]
    assert len(set(labels)) == 5
    assert all(label.startswith("expert_threshold (ema_decay=0.1235)") for label in labels[3:])


def test_a_key_that_a_run_does_not_have_is_not_in_its_label() -> None:
    one, other = run(routing="ExpertThreshold"), run(routing="ExpertThreshold")
    other.config["model"]["optimizer"]["momentum"] = 0.95
    labels = [found.label for found in group([one, other])[0]]
    assert labels == ["expert_threshold", "expert_threshold (momentum=0.95)"]


def test_a_folder_given_twice_is_read_once(runs: Path) -> None:
    found, _ = read_folders([Path("runs/tc-1"), Path("runs"), Path("runs/../runs/tc-1")])
    assert len(found) == 7


def test_of_two_runs_of_one_configuration_and_seed_the_later_counts() -> None:
    groups, notes = group([run(loss=1.0), run(loss=2.0)])
    assert groups[0].values("loss") == {1: 2.0}
    assert "left out" in notes[0]


def write(folder: Path, finished: FinishedRun) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(finished.config)))
    (folder / "summary.json").write_text(json.dumps(finished.summary))
    (folder / "tracking.jsonl").write_text("")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Token choice 1.0 1.1 1.2; threshold 0.3 below, ± 0.01; dense once, at another learning rate."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for seed, noise in ((1, 0.01), (2, 0.0), (3, -0.01)):
        write(tmp_path / f"runs/tc-{seed}", run(0.9 + seed / 10, seed))
        write(tmp_path / f"runs/et-{seed}", run(0.6 + seed / 10 + noise, seed, "ExpertThreshold"))
    write(tmp_path / "runs/dense-1", run(1.4, 1, None, lr=0.01, layers={}))
    write(tmp_path / "runs/killed", run())
    (tmp_path / "runs/killed/summary.json").unlink()
    return tmp_path / "runs"


def test_the_command_prints_and_saves_the_comparison(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "runs", "--baseline=token_choice", "--output_dir=out", "--no_mlflow"]) == 0
    out = capsys.readouterr().out
    page = Path("out/comparison.md").read_text()
    assert page in out
    rows = {row["routing"]: row for row in csv.DictReader(Path("out/comparison.csv").read_text().splitlines())}
    assert set(rows) == {"token_choice", "expert_threshold", "dense"}
    threshold, dense = rows["expert_threshold"], rows["dense"]
    assert float(threshold["loss"]) == pytest.approx(0.8)
    assert float(threshold["loss_difference"]) == pytest.approx(-0.3)
    assert float(threshold["loss_difference_half_width"]) == pytest.approx(4.303 * 0.01 / math.sqrt(3), rel=1e-3)
    assert (threshold["pairs"], threshold["excludes_zero"]) == ("3", "true")
    assert float(threshold["max_load"]) == 2.5
    assert float(threshold["fanout_mean"]) == 0.75
    assert dense["max_load"] == dense["fanout_mean"] == dense["loss_half_width"] == dense["excludes_zero"] == ""
    assert float(dense["loss_difference"]) == pytest.approx(0.4)
    # the losses' own intervals overlap widely: only the pairing shows the difference
    assert float(rows["token_choice"]["loss_half_width"]) == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1  # reads well in a terminal, too
    cells = {row[1]: row for row in ([cell.strip() for cell in line.split("|")] for line in lines)}
    assert cells["expert_threshold"][2] == "1, 2, 3"
    assert cells["expert_threshold"][3].startswith("0.8000 ± ")
    assert cells["expert_threshold"][-3:-1] == ["-0.3000 ± 0.0248 (3 pairs)", "yes"]
    assert cells["dense"][-3:-1] == ["+0.4000 (1 pair)", "unknown: one common seed"]
    assert "`model.optimizer.muon_lr`: dense: 0.01; expert_threshold: 0.02; token_choice: 0.02" in page
    assert "not finished, left out: runs/killed" in page
    assert Path("out/comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give run folders, or --experiment_name"),
        (["nowhere"], "nowhere: no such folder"),
        (["runs/tc-1/.."], None),
        (["runs", "--baseline=expert_choice"], "--baseline 'expert_choice': no such group"),
        (["runs/killed"], "no finished run found"),
    ],
)
def test_bad_input_is_refused(args: list[str], message: str | None, runs: Path, capsys: Any) -> None:
    code = main(["compare", *args, "--no_mlflow", "--output_dir=out"])
    error = capsys.readouterr().err
    assert code == (2 if message else 0)
    assert (message or "") in error
    assert Path("out").exists() == (message is None)


def test_a_run_of_an_older_version_is_named(runs: Path) -> None:
    old = json.loads((runs / "tc-1/summary.json").read_text())
    del old["data"]
    (runs / "tc-1/summary.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"tc-1: its summary\.json has no 'data'"):
        read_folders([runs])
