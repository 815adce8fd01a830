"""A study with a stand-in for ``fit``: what is trained in which order, going on after kills, and the page."""

import csv
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from lightning_moe.cli.main import main
from lightning_moe.config.compose import merge
from lightning_moe.errors import UserError
from lightning_moe.runs.folder import RUN_VARIABLE
from lightning_moe.study.main import run_study
from lightning_moe.study.page import description
from lightning_moe.study.results import read_results
from lightning_moe.study.runs import compared_runs, tuned_values, tuning_runs
from lightning_moe.study.spec import Study, read_study
from lightning_moe.sweep import pool
from lightning_moe.sweep.locks import LEADER, FileLocks
from lightning_moe.tracking.store import DEFAULT_URI

STAND_IN = (sys.executable, str(Path(__file__).with_name("study_fit.py")))
DECAY = "model.routing.init_args.ema_decay"
CONTENT: dict[str, Any] = {
    "name": "tiny",
    "config": ["model/tiny", {"trainer.log_every_n_steps": 1, "tracking.enabled": False}],
    "tune": {"key": "model.optimizer.muon_lr", "values": [0.01, 0.02, 0.04], "seed": 100},
    "seeds": [1, 2],
    "baseline": "token_choice",
    "methods": {
        "token_choice": {"include": ["routing/token_choice"]},
        "threshold": {"include": ["routing/expert_threshold"], DECAY: 0.0},
        "threshold_slow": {"as": "threshold", DECAY: 0.5},
    },
}
Make = Callable[..., Study]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Write ``study.yaml`` with some top-level keys changed (None removes one), and read it; ``fit`` is a stand-in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(RUN_VARIABLE, "")
    monkeypatch.setattr(pool, "FIT", STAND_IN)  # processes that are forked have it, too
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.02)

    def build(**changes: Any) -> Study:
        content = {key: value for key, value in (CONTENT | changes).items() if value is not None}
        Path("study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return read_study(Path("study.yaml"))

    return build


def page_of(study: Study) -> str:
    """The study's page, its tables without the spaces that align them."""
    return re.sub(r" +\|", " |", (study.folder / "results.md").read_text())


def to_end(study: Study, workers: int = 2, **options: Any) -> list[str]:
    """Run the study and return the lines that it printed."""
    with redirect_stdout(StringIO()) as said:
        run_study(study, workers, **options)
    return said.getvalue().splitlines()


def starts(study: Study) -> dict[str, int]:
    return {path.parent.name: len(path.read_text().split()) for path in study.folder.rglob("starts")}


def test_each_method_is_compared_at_its_own_best_value(make: Make) -> None:
    study = make()
    said = to_end(study)
    assert [run.name for run in tuning_runs(study)] == [
        "token_choice-0.01", "token_choice-0.02", "token_choice-0.04",
        "threshold-0.01", "threshold-0.02", "threshold-0.04",
    ]  # fmt: skip
    tuned = tuned_values(study)
    assert tuned == {"token_choice": 0.04, "threshold": 0.02}  # as the stand-in's formula has it
    names = ["token_choice-0.04", "threshold-0.02", "threshold_slow-0.02"]
    assert [run.name for run in compared_runs(study, tuned)] == [f"{name}-s{seed}" for seed in (1, 2) for name in names]
    assert set(starts(study).values()) == {1}
    assert len(starts(study)) == 6 + 6
    slow = yaml.safe_load((study.folder / "compare/threshold_slow-0.02-s2/config.yaml").read_text())
    assert slow["model"]["optimizer"]["muon_lr"] == 0.02
    assert slow["model"]["routing"] == {
        "class_path": "lightning_moe.routing.ExpertThreshold",
        "init_args": {"capacity_factor": 0.5, "ema_decay": 0.5},
    }
    assert slow["seed_everything"] == 2
    tags = json.loads((study.folder / "compare/threshold_slow-0.02-s2/tracking.jsonl").read_text())["tags"]
    assert tags["study"] == "tiny"
    assert tags["stage"] == "compare"
    assert tags["method"] == "threshold_slow"
    assert "tune: 0 of 6 runs are there" in said
    assert "compare: 0 of 6 runs are there" in said
    to_end(study)
    assert set(starts(study).values()) == {1}, "a second start trains nothing again"


def test_the_page_has_the_numbers_of_the_runs(make: Make) -> None:
    reference = {"source": "a paper", "loss": {"token_choice": 2.5, "threshold": 2.25}}
    study = make(reference=reference)
    to_end(study)
    page = page_of(study)
    # the same seed adds the same to both: threshold_slow is 0.5 above, without any spread; its training loss 0.1 below
    losses = "| threshold_slow | 0.02 | 2 | 3.5150 ± 0.0635 | 1.7575 ± 0.0318 |"
    assert f"{losses} 1.50 | 0.750 | +0.100 | +0.5000 ± 0.0000 (2 pairs) | yes |" in page
    assert "| threshold | +0.0000 | -0.250 |" in page.replace(" ± 0.0000", "")
    assert "| token_choice | 3.3625 | 3.0906 | **3.0000** |".replace("3.", "4.") in page  # seed 100 adds 1
    assert "the best in bold; a variant takes the value of its method):" in page
    assert "At the edge of the tuned range, so perhaps better beyond it: token_choice." in page
    assert "| threshold_slow | 3.5100 | 3.5200 |" in page
    assert "an interval excludes 0 more often than once in twenty" in page  # the values were tuned
    assert "at abcdef0; a CPU" in page
    assert "640 tokens of Text in 10 steps" in page
    for name in ("comparison", "tuning", "training"):
        assert (study.folder / f"images/tiny_{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"](images/tiny_{name}.png)" in page
    table = list(csv.DictReader((study.folder / "results.csv").read_text().splitlines()))
    assert [row["routing"] for row in table] == list(CONTENT["methods"])
    assert float(table[2]["loss_difference"]) == pytest.approx(0.5)


def test_the_page_is_in_mlflow_always_in_the_same_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_moe.tracking.files_run.FINALIZE_SECONDS", 200.0)  # for a busy machine
    study = make(config=["model/tiny", {"trainer.log_every_n_steps": 1}])
    address = next(line for line in to_end(study) if line.startswith("in MLflow: "))
    assert address in to_end(study, report_only=True)
    client = MlflowClient(DEFAULT_URI)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.kind = 'study'")
    assert run.info.run_id in address
    assert run.info.status == "FINISHED"
    top = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert top == {"results.md", "results.csv", "images"}
    images = {file.path for file in client.list_artifacts(run.info.run_id, "images")}
    assert images == {f"images/tiny_{name}.png" for name in ("comparison", "tuning", "training")}
    client.download_artifacts(run.info.run_id, "results.md", ".")
    page = (study.folder / "results.md").read_text()
    assert Path("results.md").read_text() == page
    note = run.data.tags["mlflow.note.content"]
    assert [line for line in page.splitlines() if line[:1] == "|"] == [
        line for line in note.splitlines() if line[:1] == "|"
    ]
    assert "![" not in note, "MLflow would not find the pictures"


def test_a_part_that_mlflow_would_cut_is_left_out_of_the_description(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make()
    to_end(study)
    whole = description(read_results(study))
    monkeypatch.setattr("lightning_moe.study.page.LONGEST_TAG", len(whole) - 1)
    shorter = description(read_results(study))
    assert whole.startswith(shorter.rstrip())
    assert whole.removeprefix(shorter.rstrip()).startswith("\n\nValidation loss of each run, by seed:")


def test_without_tracking_nothing_is_sent(make: Make) -> None:
    study = make()
    assert not any(line.startswith("in MLflow") for line in to_end(study))
    assert not Path("mlflow.db").exists()


def test_more_seeds_and_values_keep_the_runs_that_are_there(make: Make) -> None:
    to_end(make())
    study = make(seeds=[1, 2, 3], tune=CONTENT["tune"] | {"values": [0.01, 0.02, 0.03, 0.04]})
    to_end(study)
    assert set(starts(study).values()) == {1}
    assert len(starts(study)) == 8 + 9
    assert "| threshold_slow | 0.02 | 3 |" in page_of(study)


def test_where_the_last_steps_are_not_logged_the_last_value_stands_for_them(make: Make) -> None:
    study = make(config=["model/tiny", {"trainer.log_every_n_steps": 4, "tracking.enabled": False}])
    to_end(study)
    # the stand-in's training loss is 0.1 below the final one at its last step, and 0.9 above it before
    page = page_of(study).replace(" ± 0.000 |", " |")
    assert "| 1.50 | 0.750 | -0.900 | +0.5000 ± 0.0000 (2 pairs) | yes |" in page


def test_a_page_of_ones_own_keeps_its_text(make: Make) -> None:
    study, page = make(), Path("docs/results.md")
    page.parent.mkdir()
    page.write_text("# Mine\n")
    with pytest.raises(UserError, match="has not the lines"):
        to_end(study, page=page)
    assert page.read_text() == "# Mine\n"
    assert not starts(study), "refused before the first run"
    page.write_text("# Mine\n<!-- tiny: begin, written by `study` -->of before<!-- tiny: end -->\nMy words.\n")
    to_end(study, page=page)
    text = page.read_text()
    assert text.startswith("# Mine\n")
    assert text.endswith("My words.\n")
    assert "of before" not in text
    assert "| threshold_slow |" in text
    assert Path("docs/images/tiny_training.png").exists()
    to_end(study, page=page, report_only=True)
    assert page.read_text() == text, "written twice, it is the same"


def test_a_run_that_diverges_is_not_tried_again_and_one_that_crashes_is(make: Make) -> None:
    methods = CONTENT["methods"] | {
        "wild": {"include": ["routing/token_choice"], "model.optimizer.head_lr": 9.0},
    }
    study = make(tune=CONTENT["tune"] | {"values": [0.02, 0.04, 2.0]}, methods=methods)
    with pytest.raises(UserError, match=r"2 runs failed.*\n.*wild-0.02: exit code 1: RuntimeError: out of memory"):
        to_end(study)
    first = starts(study)
    assert first["token_choice-2"] == first["wild-2"] == 1
    page = page_of(study)
    assert "| wild | – | – | diverged |" in page
    assert "Diverged: token_choice-2, threshold-2, wild-2." in page
    assert "**Not complete: 2 of the compared runs are missing.**" in page
    Path("repaired").touch()
    to_end(study)
    assert starts(study) == first | {"wild-0.02": 2, "wild-0.04": 2, "wild-0.04-s1": 1, "wild-0.04-s2": 1}
    assert "Not complete" not in page_of(study)


def test_a_method_that_diverges_everywhere_is_left_out_with_its_variants(make: Make) -> None:
    lost = {"include": ["routing/token_choice"], "model.optimizer.head_lr": 1e-10}
    study = make(methods=CONTENT["methods"] | {"lost": lost, "lost_too": {"as": "lost"}})
    assert "lost_too: left out, as every model.optimizer.muon_lr diverged" in to_end(study)
    assert set(starts(study).values()) == {1}
    assert len(starts(study)) == 9 + 6
    to_end(study, report_only=True)
    page = page_of(study)
    assert "Not compared, as every tuned value diverged: lost, lost_too." in page
    assert "| lost | diverged | diverged | diverged |" in page
    assert "Not complete" not in page
    assert "| threshold_slow | 0.02 | 2 |" in page


def test_a_baseline_that_diverges_everywhere_is_named_beside_the_failures(make: Make) -> None:
    lost = {"include": ["routing/token_choice"], "model.optimizer.head_lr": 1e-10}
    wild = {"include": ["routing/token_choice"], "model.optimizer.head_lr": 9.0}
    study = make(methods={"lost": lost, "wild": wild}, baseline="lost")
    message = (
        r"baseline 'lost' diverged at every model.optimizer.muon_lr of 0.01, 0.02, 0.04\n3 runs failed(.|\n)*wild-0.04"
    )
    with pytest.raises(UserError, match=message):
        to_end(study)


def test_whole_numbers_stay_whole_and_near_values_apart(make: Make) -> None:
    tune = {"key": "model.decoder.num_experts", "values": [4, 8], "seed": 100}
    study = make(tune=tune)
    to_end(study)
    assert [run.name for run in tuning_runs(study)][:2] == ["token_choice-4", "token_choice-8"]
    experts = yaml.safe_load((study.folder / "tune/token_choice-4.yaml").read_text())["model"]["decoder"]["num_experts"]
    assert (experts, type(experts)) == (4, int)
    assert "| token_choice | 4 | 2 |" in page_of(study)
    names = [run.name for run in tuning_runs(make(tune=tune | {"values": [0.1234567, 0.1234568, 1234567]}))]
    assert names[:3] == [f"token_choice-{value}" for value in (0.1234567, 0.1234568, 1234567)]


def test_without_training_losses_there_is_no_gap_and_no_training_figure(make: Make) -> None:
    study = make(config=["model/tiny", {"trainer.log_every_n_steps": 100, "tracking.enabled": False}])
    to_end(study)
    page = page_of(study)
    assert "| 1.50 | 0.750 | – | +0.5000 ± 0.0000 (2 pairs) | yes |" in page
    assert "tiny_training.png" not in page


def test_a_page_that_cannot_be_one_is_refused_before_the_first_run(make: Make) -> None:
    study = make()
    Path("folder").mkdir()
    Path("binary.md").write_bytes(b"\xff\xfe\x00")
    for page in ("folder", "binary.md", "binary.md/new.md"):
        with pytest.raises(UserError, match=f"{page}: cannot be used as the page: "):
            to_end(study, page=Path(page))
    assert not starts(study)


def test_a_report_is_of_the_configuration_of_the_file(make: Make) -> None:
    to_end(make())
    study = make(config=["model/tiny", {"trainer.log_every_n_steps": 1, "trainer.max_steps": 7}])
    with pytest.raises(UserError, match=r"tune/token_choice-0\.01: was trained with another configuration"):
        to_end(study, report_only=True)


def test_a_kill_loses_no_finished_run(make: Make) -> None:
    slow = {"model.optimizer.embedding_lr": 0.05, "trainer.log_every_n_steps": 1, "tracking.enabled": False}
    study = make(config=["model/tiny", slow])
    process = multiprocessing.get_context("fork").Process(target=to_end, args=(study,))
    process.start()
    deadline = time.monotonic() + 60
    while not any(study.folder.rglob("summary.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    finished = {path.parent.name for path in study.folder.rglob("summary.json")}
    assert finished
    to_end(study)
    counts = starts(study)
    assert all(counts[name] == 1 for name in finished)
    assert len(counts) == 12
    assert "Not complete" not in page_of(study)


def lock_until_killed(path: Path, locked: Any) -> None:
    assert FileLocks(path).try_lock(LEADER)
    locked.set()
    time.sleep(600)


def test_a_study_has_one_process_and_the_refusal_names_it(make: Make) -> None:
    study, context = make(), multiprocessing.get_context("fork")
    locked = context.Event()
    holder = context.Process(target=lock_until_killed, args=(study.folder / "study.lock", locked), daemon=True)
    holder.start()
    assert locked.wait(60)
    with pytest.raises(UserError, match=f"runs/tiny: process {holder.pid} works on this study"):
        to_end(study)
    assert not starts(study)
    holder.kill()
    holder.join()
    to_end(study)


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_command_says_so_in_one_line_and_goes_on(
    make: Make, capfd: pytest.CaptureFixture[str], how: signal.Signals, code: int
) -> None:
    slow = {"model.optimizer.embedding_lr": 0.1, "trainer.log_every_n_steps": 1, "tracking.enabled": False}
    study = make(config=["model/tiny", slow])
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(main(["study", "study.yaml"])))
    process.start()
    deadline = time.monotonic() + 60
    while not any(starts(study).values()) and time.monotonic() < deadline:  # not when the file is there but empty
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, how)
    process.join(60)
    assert process.exitcode == code
    assert capfd.readouterr().err == "stopped: the same command continues from here\n"
    assert not any(study.folder.rglob("summary.json")), "what ran was stopped with it"
    to_end(study)
    assert max(starts(study).values()) == 2


def test_another_configuration_under_the_same_name_is_refused(make: Make) -> None:
    to_end(make())
    study = make(config=["model/tiny", {"trainer.max_steps": 7}])
    with pytest.raises(UserError, match=r"tune/token_choice-0\.01: was trained with another configuration"):
        to_end(study)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"a": {"as": "b"}}}, "a.as='b': must be an earlier method that is tuned itself"),
        ({"baseline": "token_choise"}, "baseline='token_choise': is no method: did you mean 'token_choice'"),
        ({"seeds": [1, 100]}, "tune.seed=100: is also in seeds"),
        ({"seeds": [1, 1]}, "list of different whole numbers"),
        ({"tune": {"key": "k", "values": [0.2, 0.1], "seed": 9}}, "rising order"),
        ({"tune": {"key": "k", "values": [0.1]}}, "tune.seed: missing"),
        ({"metods": {}}, "unknown key 'metods': did you mean 'methods'"),
        ({"methods": None}, "methods: missing"),
        (
            {"reference": {"source": "s", "loss": {"thresold": 1.0}}},
            "'thresold': is no method: did you mean 'threshold'",
        ),
        ({"methods": {"a/b": {}}}, "must be a plain folder name"),
    ],
)
def test_bad_files_are_refused(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_a_misspelt_key_is_refused_before_the_first_run(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    study = make(methods=CONTENT["methods"] | {"odd": {"as": "threshold", "threshold_warmup.step": 3}})
    assert main(["study", "study.yaml"]) == 2
    assert "threshold_warmup.step" in capsys.readouterr().err
    assert not starts(study)


def test_without_a_run_of_the_baseline_there_is_no_page(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make()
    assert main(["study", "study.yaml", "--report"]) == 2
    assert "no finished run of the baseline 'token_choice' yet" in capsys.readouterr().err


def test_the_shipped_study_is_read() -> None:
    file = Path(__file__).parents[2] / "sweeps/study.yaml"
    small, large = read_study(file), read_study(file, ["experiment/study/large"], "study_large")
    assert len(small.seeds) >= 3
    assert merge(large.base)["data"]["corpus"]["class_path"] == "lightning_moe.data.SitePackages"
    assert (small.folder, large.folder) == (Path("runs/study"), Path("runs/study_large"))
