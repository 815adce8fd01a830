"""The files of a run's record with other content than the program writes: each reader refuses them in a line."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.bad_content import EVERY, one_each, surprises, wrong_contents

from lightning_moe.analysis.training_record import TrainingRecord
from lightning_moe.errors import UserError
from lightning_moe.filenames import JOURNAL_FILE, METRICS_FILE, MLFLOW_RUN_FILE, SUMMARY_FILE
from lightning_moe.study.results import _curve, _provenance
from lightning_moe.sweep.results import MetricFollower, final_values
from lightning_moe.tracking.files import read_metrics
from lightning_moe.tracking.recovery import close_abandoned_run, upload
from lightning_moe.tracking.session import RunSession
from lightning_moe.tracking.state import RunState, read_state
from lightning_moe.training.record import has_validation_of


@pytest.fixture
def run(session: RunSession, tmp_path: Path) -> Path:
    """A run's record with a line of each kind."""
    for step in range(3):
        session.log_metrics(step, {"train/loss": 3.0 - step, "val/loss": 2.0, "routing/layer_00/max_load": 1.0})
    (session.run_dir / "figure.png").write_bytes(b"picture")
    session.log_artifact(session.run_dir / "figure.png", "figures")
    session.log_event("params", params={"model.lr": "1"})
    session.log_event("cut", size=(session.run_dir / METRICS_FILE).stat().st_size)
    session.end("FINISHED")
    session.close()
    (session.run_dir / SUMMARY_FILE).write_text("{}")
    return session.run_dir


def write_line(file: Path, number: int, content: Any) -> None:
    lines = file.read_text().splitlines()
    lines[number] = json.dumps(content)
    file.write_text("\n".join([*lines, ""]))


def rewind(run: Path) -> None:
    session = RunSession(run, "sqlite:///unused.db", "e", None, 1.0, {})
    try:
        session.rewind(2)
    finally:
        session.close()


METRIC_READERS: dict[str, Callable[[Path], object]] = {
    "read_metrics": read_metrics,
    "analysis": lambda run: TrainingRecord.read(run, ["layer_00"], [1.0], None),
    "sweep while it trains": lambda run: MetricFollower(run, "train/loss").new_values(),
    "sweep": final_values,
    "study": _curve,
    "validation": lambda run: has_validation_of(3, run),
    "rewind": rewind,
}


@EVERY
@pytest.mark.parametrize("reader", METRIC_READERS)
def test_every_key_of_a_line_of_metrics(reader: str, every: bool, run: Path, tmp_path: Path) -> None:
    file, copied = run / METRICS_FILE, tmp_path / "copy"

    def read(content: Any) -> None:
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(run, copied)
        write_line(copied / METRICS_FILE, 1, content)
        METRIC_READERS[reader](copied)

    content = json.loads(file.read_text().splitlines()[1])
    contents = wrong_contents(content)
    assert surprises(contents if every else one_each(contents), read, f"{copied / METRICS_FILE}, line 2") == []


def test_numbers_that_are_none_are_as_they_were_logged(run: Path) -> None:
    with (run / METRICS_FILE).open("a") as file:
        file.write('{"step": 3, "time": 1.5, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 3, "e": 1e400}\n')
    last = read_metrics(run)[-1]
    assert math.isnan(last.pop("a"))
    assert last == {"step": 3, "time": 1.5, "b": math.inf, "c": -math.inf, "d": 3.0, "e": math.inf}


def kinds(run: Path) -> dict[str, int]:
    lines = (run / JOURNAL_FILE).read_text().splitlines()
    return {json.loads(line)["event"]: number for number, line in enumerate(lines)}


@EVERY
@pytest.mark.parametrize("kind", ["start", "tags", "artifact", "params", "cut", "end"])
@pytest.mark.parametrize("reader", ["upload", "close_abandoned_run", "study"])
def test_every_key_of_an_event(kind: str, reader: str, every: bool, run: Path, store: str, tmp_path: Path) -> None:
    number, copied = kinds(run)[kind], tmp_path / "copy"

    class Run:
        folder = copied

    def read(content: Any) -> None:
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(run, copied)
        write_line(copied / JOURNAL_FILE, number, content)
        if reader == "upload":
            upload(copied, store)
        elif reader == "study":
            _provenance([Run()])  # type: ignore[list-item]
        else:
            close_abandoned_run(copied)

    content = json.loads((run / JOURNAL_FILE).read_text().splitlines()[number])
    contents = wrong_contents(content)
    found = surprises(contents if every else one_each(contents), read, str(copied))
    # without its kind, the line is none of this version's events
    assert [line for line in found if not line.startswith("event: text")] == []


def test_a_line_that_the_uploading_process_cannot_take_is_said_and_changes_nothing(
    run: Path, store: str, tmp_path: Path
) -> None:
    write_line(run / METRICS_FILE, 1, {"step": "one", "time": 1.0, "train/loss": 2.0})
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: step='one': must be a whole number"):
        upload(run, store)


def test_every_key_of_the_state(tmp_path: Path) -> None:
    RunState("sqlite:///a.db", "e", "1", "abc", 10, 20).save(tmp_path)
    content = json.loads((tmp_path / MLFLOW_RUN_FILE).read_text())

    def read(content: Any) -> None:
        (tmp_path / MLFLOW_RUN_FILE).write_text(json.dumps(content))
        state = read_state(tmp_path)
        assert state is not None
        assert isinstance(state.tracking_uri + state.run_id, str)
        assert min(state.sent_metrics, state.sent_journal) >= 0

    assert surprises(wrong_contents(content), read, str(tmp_path / MLFLOW_RUN_FILE)) == []
