"""``analyze`` on the command line: real runs, their report and its place in MLflow; refused input."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from helpers.small_run import Command, tokenizer_of

from lightning_moe.analysis.publish import attach
from lightning_moe.tracking.files import read_lines

ALL = [
    "intensity",
    "fanout",
    "fanout_and_loss",
    "load",
    "specialization",
    "vocabulary",
    "coactivation",
    "similarity",
    "cutoff_vs_usage",
    "router_logits",
    "gates",
    "consistency",
    "saturation",
    "ablation",
    "compute",
    "pools",
    "regret",
    "train_eval_gap",
    "usage_over_training",
    "warmup",
    "capacity",
]


@pytest.fixture
def ckpt(command: Command) -> str:
    code, _, err = command("fit", "--config", "small", "--run_name=a", "--checkpoint.keep_all=true")
    assert code == 0, err
    return "runs/a/checkpoints/last.ckpt"


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "numbers" / f"{name}.csv").open()))


def test_a_run_is_analysed_into_its_folder(command: Command, ckpt: str, workplace: Path) -> None:
    (workplace / "mine.txt").write_text("words of mine\n" * 30)
    arguments = (
        "analyze",
        "--ckpt_path",
        ckpt,
        "--text=mine=mine.txt",
        "--max_tokens=200",
        "--batch_size=4",
        "--ablation_tokens=20",
    )
    code, out, err = command(*arguments)
    assert code == 0, err
    folder = Path("runs/a/analysis")
    assert f"report: {folder / 'report.html'}" in out
    assert "MLflow does not know this run" in out
    content = json.loads((folder / "analysis.json").read_text())
    assert list(content) == ["summary", "facts", *ALL]
    assert [row["domain"] for row in content["facts"]["Text"]] == ["text", "mine"]
    # the summary has the numbers of the sections
    found = {row["text"]: row["values"]["a, step 4"] for row in content["summary"]["findings"]}
    [checkpoint] = content["facts"][next(iter(content["facts"]))]
    [fanout], [layer] = (content[name]["summary"] for name in ("fanout", "load"))
    assert found["loss / nats per token"] == checkpoint["loss / nats per token"]
    assert found["routed experts per token and layer"] == fanout["mean fanout per layer"]
    assert found["load of the busiest expert / mean of its layer"] == layer["highest / mean"]
    assert found["which expert that is"] == f"layer_01, expert {layer['busiest expert']}"
    assert found["dead experts (no token)"] == layer["dead"]
    [distance] = content["specialization"]["summary"]
    assert found["their total variation, mean over layers"] == distance["TV layer_01"]
    [usage] = content["cutoff_vs_usage"]["summary"]
    assert found["std of the cutoff over batches / logit units"] == usage["cutoff − threshold, std over batches"]
    assert content["facts"]["Text"][1]["tokens"] == 200
    assert content["ablation"]["summary"][0]["tokens"] == 32  # whole windows
    not_shown = {"consistency", "saturation"}
    assert all(content[name]["missing"] for name in not_shown)
    shown = {path.stem for path in (folder / "figures").iterdir()}
    not_shown |= {"regret"}
    assert shown == set(ALL) - not_shown
    assert "--regret_tokens N measures it" in content["regret"]["missing"][0]
    assert {row["domain"] for row in rows(folder, "specialization")} == {"text", "mine"}
    assert 'data-tip="' in (folder / "report.html").read_text()

    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert "nothing is overwritten without --overwrite" in err
    assert command(*arguments, "--overwrite", "--regret_tokens=5", "--regret_routes=3")[0] == 0
    content = json.loads((folder / "analysis.json").read_text())
    assert content["regret"]["missing"] == []
    assert content["regret"]["summary"][0]["tokens"] == 5
    assert {row["pairs"] for row in rows(folder, "regret_by_layer")} == {"5"}
    assert (folder / "figures" / "regret.png").exists()


@pytest.mark.slow
def test_checkpoints_side_by_side(command: Command, ckpt: str, workplace: Path) -> None:
    code, _, err = command("fit", "--config", "small", "--config", "routing/dense", "--run_name=d")
    assert code == 0, err
    pair = (
        "--ckpt_path",
        "early=runs/a/checkpoints/step-000004.ckpt",
        "--ckpt_path",
        ckpt,
        "--ckpt_path=runs/d/checkpoints/last.ckpt",
    )
    code, _, err = command("analyze", *pair, "--max_tokens=100", "--compare_num_experts_per_token", "--pools")
    assert code == 0, err
    content = json.loads(Path("analysis/analysis.json").read_text())
    labels = [row["checkpoint"] for row in content["facts"][next(iter(content["facts"]))]]
    assert labels == ["early", "a, step 4", "d, step 4"]
    # the last checkpoint is the same step: identical routing
    [pair_row] = content["consistency"]["summary"]
    assert (pair_row["weighted Jaccard"], pair_row["JSD / bits"]) == (1.0, 0.0)
    assert {row["layer"] for row in rows(Path("analysis"), "consistency")} == {"layer_01", "all"}
    assert [row["checkpoint"] for row in rows(Path("analysis"), "compute")] == labels  # no dial: a point each
    assert any("dense" in note for note in content["warmup"]["missing"])


def test_a_checkpoint_outside_of_a_run(command: Command, ckpt: str, workplace: Path) -> None:
    (workplace / "alone.ckpt").write_bytes(Path(ckpt).read_bytes())
    (workplace / "mine.txt").write_text("words of mine\n" * 30)
    tokenizer = tokenizer_of(ckpt)
    arguments = (
        "analyze",
        "--ckpt_path=alone.ckpt",
        "--tokenizer",
        tokenizer,
        "--max_tokens=60",
        "--compare_num_experts_per_token",
    )
    code, _, err = command(*arguments, "--text=mine=mine.txt")
    assert code == 0, err
    content = json.loads(Path("analysis/analysis.json").read_text())
    for name in ("train_eval_gap", "usage_over_training", "warmup", "capacity"):
        assert "not in a run's folder" in content[name]["missing"][0]
        assert not Path(f"analysis/figures/{name}.png").exists()

    other = yaml.safe_load(Path("small.yaml").read_text())
    other["data"]["tokenizer"]["vocab_size"] = 310
    Path("other.yaml").write_text(yaml.safe_dump(other))
    code, _, err = command("fit", "--config", "other", "--run_name=o", "--trainer.max_steps=2")
    assert code == 0, err
    (workplace / "empty.txt").write_text("")
    mine = "--text=mine=mine.txt"
    for extra, message in (
        (("--ckpt_path=alone.ckpt",), "not in a run's folder with a config.yaml"),
        (("--ckpt_path=gone.ckpt",), "no such file"),
        (("--ckpt_path", ckpt, "--ckpt_path=runs/o/checkpoints/last.ckpt"), "have different tokenizers (a, step 4: "),
        (("--ckpt_path", ckpt, "--ckpt_path", ckpt), "two checkpoints are called 'a, step 4'; give names"),
        (("--ckpt_path", ckpt, "--text=mine="), "--text mine=: must be PATH or NAME=PATH"),
        (("--ckpt_path", ckpt, "--text=gone.txt"), "--text gone.txt: no file matches"),
        (("--ckpt_path", ckpt, "--text=mine=gone.txt"), "--text mine=gone.txt: no file matches"),
        (("--ckpt_path", ckpt, mine, mine), "the domain 'mine' exists already"),
        (("--ckpt_path=alone.ckpt", "--tokenizer", tokenizer), "it encodes --text"),
        (("--ckpt_path=alone.ckpt", "--tokenizer", tokenizer, "--text=e=empty.txt"), "there is no text to analyse"),
        (("--ckpt_path", ckpt, "--sequence_length=17"), "--sequence_length 17: the model's context is 16"),
        (("--ckpt_path", ckpt, "--batch_size=0"), "0: must be at least 1"),
        (("--ckpt_path", ckpt, "--compare_num_experts_per_token", "-1"), "-1: must be above 0"),
        (("--ckpt_path", ckpt, "--pools", "3"), "--pools 3: must divide --batch_size 8"),
        (("--ckpt_path", ckpt, "--output_dir=small.yaml"), "is a file; name a folder"),
        (("--ckpt_path", ckpt, "--output_dir=small.yaml/new"), "small.yaml/new: cannot be written: Not a directory"),
        (("--ckpt_path", ckpt, "--text=e=empty.txt"), "domain e (empty.txt): there is no text to analyse"),
        ((), "--ckpt_path"),
    ):
        code, out, err = command("analyze", "--output_dir=new", *extra)
        assert (code, out) == (2, ""), (extra, err)
        assert message in err
    assert not Path("new").exists()


@pytest.mark.slow
def test_the_report_is_an_artifact_of_the_run(command: Command, workplace: Path) -> None:
    import mlflow

    code, _, err = command("fit", "--config", "small", "--run_name=a", "--tracking.enabled=true")
    assert code == 0, err
    code, out, err = command(
        "analyze", "--ckpt_path=runs/a/checkpoints/last.ckpt", "--max_tokens=60", "--compare_num_experts_per_token"
    )
    assert code == 0, err
    assert "a: in MLflow, under the run's artifacts, analysis/" in out
    state = json.loads(Path("runs/a/mlflow_run.json").read_text())
    client = mlflow.MlflowClient(state["tracking_uri"])
    names = {item.path for item in client.list_artifacts(state["run_id"], "analysis")}
    assert {"analysis/report.html", "analysis/analysis.json", "analysis/figures", "analysis/numbers"} <= names
    assert client.get_run(state["run_id"]).info.status == "FINISHED"
    # a store that is away: recorded in the run's journal, sent later
    Path("runs/a/note.txt").write_text("x")
    journal = Path("runs/a/tracking.jsonl")
    lines = [line.replace("sqlite", "nosuchstore") if '"start"' in line else line for line in journal.open()]
    journal.write_text("".join(lines))
    said = attach(Path("runs/a"), Path("runs/a"), [Path("runs/a/note.txt")])
    assert "not in MLflow yet" in said
    events = [event for event, _ in read_lines(journal)]
    assert (events[-1]["event"], events[-1]["path"]) == ("artifact", "note.txt")
