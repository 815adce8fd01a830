"""The logger's own part: what it records, and what it refuses."""

import json
import logging
import math
import signal
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_moe.errors import UserError
from lightning_moe.tracking import MLflowLogger, read_metrics
from lightning_moe.tracking.logger import flatten


@pytest.fixture
def logger(tmp_path: Path):
    logger = MLflowLogger(enabled=False, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    logger.bind(tmp_path / "runs" / "a-run")
    yield logger
    logger.close()


def events(logger: MLflowLogger, kind: str) -> list[dict]:
    lines = (logger.run_dir / "tracking.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_metrics_are_on_disk_when_the_call_returns(logger: MLflowLogger):
    logger.log_metrics({"train/loss": torch.tensor(0.5), "count": 3, "bad": math.nan}, step=7)
    (line,) = read_metrics(logger.run_dir)
    assert (line["step"], line["train/loss"], line["count"]) == (7, 0.5, 3.0)
    assert math.isnan(line["bad"])
    assert abs(line["time"] - (logger.run_dir / "metrics.jsonl").stat().st_mtime) < 5


def test_without_a_step_the_last_one_holds(logger: MLflowLogger):
    logger.log_metrics({"a": 1.0}, step=7)
    logger.log_metrics({"b": 2.0})
    assert [line["step"] for line in read_metrics(logger.run_dir)] == [7, 7]


def test_a_name_that_mlflow_refuses_is_kept_on_disk_and_told_once(logger: MLflowLogger, caplog):
    for step in range(3):
        logger.log_metrics({"acc@1": 0.5, "loss": 1.0, "step": 9.0}, step=step)
    lines = read_metrics(logger.run_dir)
    assert [(line["step"], line["acc@1"], line["loss"]) for line in lines] == [
        (0, 0.5, 1),
        (1, 0.5, 1),
        (2, 0.5, 1),
    ]
    told = sorted(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert len(told) == 2
    assert told[0].startswith("metric 'acc@1' is recorded in metrics.jsonl but not in MLflow: a name has letters")
    assert told[1].startswith("metric 'step' is not recorded")


def test_the_configuration_is_kept_and_its_keys_are_parameters(logger: MLflowLogger):
    config = {
        "seed_everything": 1,
        "model": {"routing": {"class_path": "ExpertThreshold", "init_args": {"ema_decay": 0.99}}, "extra": {}},
        "data": {"files": ["a.txt", "b.txt"], "limit": None, "streaming": False},
        "odd": {"a[0]": 1, "fine": 2},
    }
    logger.log_config(yaml.safe_dump(config))
    assert yaml.safe_load((logger.run_dir / "config.yaml").read_text()) == config
    (event,) = events(logger, "params")
    assert event["params"] == {
        "seed_everything": "1",
        "model.routing.class_path": "ExpertThreshold",
        "model.routing.init_args.ema_decay": "0.99",
        "model.extra": "{}",
        "data.files": '["a.txt", "b.txt"]',
        "data.limit": "null",
        "data.streaming": "false",
        "odd": '{"a[0]": 1, "fine": 2}',
    }
    (artifact,) = events(logger, "artifact")
    assert (artifact["path"], artifact["folder"]) == ("config.yaml", None)


def test_flatten_gives_names_that_mlflow_takes():
    from mlflow.utils.validation import _validate_param_name

    for name in flatten({"a": {"b c": {"d/e": 1}, "../x": {"y": 2}}, "z": {1: 2, "k": {"[": 0}}}):
        _validate_param_name(name)


def test_passwords_are_kept_nowhere(tmp_path: Path):
    logger = MLflowLogger(enabled=False, tracking_uri="postgresql://me:secret@db/mlflow")
    logger.bind(tmp_path / "run")
    logger.log_config("tracking: {tracking_uri: 'postgresql://me:secret@db/mlflow'}")
    logger.log_tags({"store": "http://me:secret@host"})
    logger.finalize("success")
    for path in logger.run_dir.rglob("*"):
        assert "secret" not in path.read_text(), path
    assert "secret" not in str(logger.ui_command())


def test_a_figure_is_a_picture_of_the_run(logger: MLflowLogger):
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    logger.log_figure(Figure(figsize=(2, 1)), "routing/load")
    assert imread(logger.run_dir / "figures" / "routing" / "load.png").shape[:2] == (150, 300)
    (event,) = events(logger, "artifact")
    assert (event["path"], event["folder"]) == ("figures/routing/load.png", "figures/routing")
    with pytest.raises(ValueError, match=r"figure name '\.\./load'"):
        logger.log_figure(Figure(), "../load")


def test_the_start_of_the_record_says_what_the_run_was_made_with(tmp_path: Path):
    logger = MLflowLogger(enabled=False, tracking_uri=f"sqlite:///{tmp_path}/m.db", tags={"purpose": "a test"})
    logger.bind(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    logger.log_tags({"seed": 1})
    first, second = events(logger, "tags")
    assert first["tags"]["purpose"] == "a test"
    assert first["tags"]["version.torch"] == torch.__version__
    assert second["tags"] == {"seed": "1"}
    logger.close()


@pytest.mark.parametrize(
    ("reported", "error", "status"),
    [
        ("success", None, "FINISHED"),
        ("failed", RuntimeError, "FAILED"),
        ("failed", KeyboardInterrupt, "KILLED"),
        ("failed", SIGTERMException, "KILLED"),
    ],
)
def test_the_end_is_told_as_it_was(logger: MLflowLogger, reported: str, error: type | None, status: str):
    logger.log_metrics({"a": 1.0}, step=0)
    try:
        if error:
            raise error("what happened\nwhere")
        logger.finalize(reported)
    except BaseException:  # where Lightning calls finalize
        logger.finalize(reported)
    assert [event["status"] for event in events(logger, "end")] == [status]
    told = events(logger, "tags")[-1]["tags"].get("error")
    assert told == ("RuntimeError: what happened" if status == "FAILED" else None)


def test_a_run_that_nobody_ended_has_failed(logger: MLflowLogger):
    logger.log_metrics({"a": 1.0}, step=0)
    logger.close()
    assert [event["status"] for event in events(logger, "end")] == ["FAILED"]


def test_what_comes_after_the_end_is_recorded_and_does_not_undo_it(logger: MLflowLogger):
    logger.log_metrics({"a": 1.0}, step=0)
    logger.finalize("success")
    logger.log_metrics({"test/loss": 2.0}, step=1)
    logger.close()
    assert [line["step"] for line in read_metrics(logger.run_dir)] == [0, 1]
    assert len(events(logger, "start")) == 1
    assert [event["status"] for event in events(logger, "end")] == ["FINISHED"]


def test_only_rank_zero_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = MLflowLogger()
    logger.bind(tmp_path / "run")
    logger.log_config("a: 1")
    logger.log_metrics({"a": 1.0}, step=0)
    logger.log_tags({"a": 1})
    logger.rewind(0)
    logger.finalize("success")
    logger.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [0, 3, 5, 99])
def test_rewind_keeps_what_was_recorded_before_the_step(logger: MLflowLogger, step: int):
    for at in range(5):
        logger.log_metrics({"train/loss": float(at)}, step=at)
        logger.log_metrics({"val/loss": float(at)}, step=at)
    before = read_metrics(logger.run_dir)
    logger.rewind(step)
    logger.log_metrics({"train/loss": -1.0}, step=step)
    lines = read_metrics(logger.run_dir)
    assert lines[:-1] == [line for line in before if line["step"] < step]
    assert lines[-1]["train/loss"] == -1.0


def test_rewind_of_a_new_run_says_nothing(logger: MLflowLogger):
    logger.rewind(0)
    logger.log_metrics({"a": 1.0}, step=0)
    assert events(logger, "cut") == []
    assert "resumed_from_step" not in events(logger, "tags")[-1]["tags"]


def test_a_second_training_in_the_same_directory_is_refused(logger: MLflowLogger, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lightning_moe.tracking.session.LOCK_SECONDS", 0.0)
    logger.log_metrics({"a": 1.0}, step=0)
    other = MLflowLogger(enabled=False)
    other.bind(logger.run_dir)
    with pytest.raises(UserError, match="is in use by another process: choose another run_name"):
        other.log_metrics({"a": 2.0}, step=0)
    logger.finalize("success")
    other.log_metrics({"a": 2.0}, step=1)
    assert [line["a"] for line in read_metrics(logger.run_dir)] == [1.0, 2.0]
    other.close()


def test_a_full_disk_costs_the_record_not_the_training(tmp_path: Path, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    logger = MLflowLogger(enabled=False)
    logger.bind(tmp_path / "run")
    for step in range(3):
        logger.log_metrics({"a": 1.0}, step=step)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]
    logger.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tracking_uri": "file:./mlruns"}, r"tracking.tracking_uri is 'file:./mlruns': MLflow keeps runs in a data"),
        ({"tracking_uri": "./mlruns"}, r"tracking.tracking_uri is './mlruns'"),
        ({"tracking_uri": "sqlite://"}, r"must name a file, such as sqlite:///mlflow.db"),
        ({"tracking_uri": "sqlite:///:memory:"}, r"must name a file"),
        ({"tracking_uri": "sqlite:////dev/null/mlflow.db"}, r"/dev/null/mlflow.db must be a file that can be written"),
        ({"tracking_uri": "sqlite:////tmp"}, r"/tmp must be a file"),
        ({"experiment_name": " "}, r"tracking.experiment_name is ' ': must have 1 to 500 characters"),
        ({"flush_seconds": 0.0}, r"tracking.flush_seconds is 0.0: must be at least 0.1"),
        ({"finalize_seconds": math.nan}, r"tracking.finalize_seconds is nan: must be at least 0"),
        ({"tags": {"a[0]": "1"}}, r"tracking.tags: 'a\[0\]' is no name for a tag"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        MLflowLogger(**settings)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    logger = MLflowLogger(enabled=False)
    logger.bind(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"the run's directory .*/file/run cannot be written"):
        logger.log_metrics({"a": 1.0}, step=0)


def test_logging_before_bind_is_a_mistake_of_the_program():
    logger = MLflowLogger(enabled=False)
    with pytest.raises(RuntimeError, match="bind"):
        logger.log_metrics({"a": 1.0}, step=0)
    logger.finalize("failed")  # must not hide the error that Lightning is reporting


@pytest.fixture(autouse=True)
def keep_ctrl_c():
    """Lightning turns Ctrl-C off after an interrupt."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)
