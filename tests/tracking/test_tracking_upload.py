"""What MLflow holds after an upload, against the record on disk. The store is a real one; nothing is mocked."""

import json
import math
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from lightning_moe.errors import UserError
from lightning_moe.tracking import read_metrics, upload
from lightning_moe.tracking.session import RunSession
from lightning_moe.tracking.state import read_state
from lightning_moe.tracking.uploader import RunUploader


def uploader(session: RunSession, notes: list[str] | None = None) -> RunUploader:
    report = (lambda text: None) if notes is None else notes.append
    return RunUploader(session.run_dir, session.tracking_uri, session.experiment_name, report)


def stored_points(session: RunSession) -> list[tuple[int, str, float]]:
    """(step, name, value) of every point MLflow has of the run, sorted."""
    client, state = MlflowClient(session.tracking_uri), read_state(session.run_dir)
    assert state
    names = client.get_run(state.run_id).data.metrics
    points = [(p.step, name, p.value) for name in names for p in client.get_metric_history(state.run_id, name)]
    return sorted(points)


def recorded_points(session: RunSession) -> list[tuple[int, str, float]]:
    """The same of the record on disk."""
    return sorted(
        (line["step"], name, value)
        for line in read_metrics(session.run_dir)
        for name, value in line.items()
        if name not in ("step", "time")
    )


def stored_run(session: RunSession):
    state = read_state(session.run_dir)
    assert state
    return MlflowClient(session.tracking_uri).get_run(state.run_id)


def test_mlflow_holds_the_record(session: RunSession):
    for step in range(30):
        session.log_metrics(step, {"train/loss": 1 / (step + 1), "routing/max_load": float(step)})
    session.log_event("params", params={"model.decoder.num_layers": "4", "run_name": ""})
    session.log_event("tags", tags={"routing": "expert_threshold"})
    session.end("FINISHED")

    uploader(session).sync()

    run = stored_run(session)
    assert stored_points(session) == recorded_points(session)
    assert len(stored_points(session)) == 60
    assert run.data.params == {"model.decoder.num_layers": "4", "run_name": ""}
    assert run.data.tags["routing"] == "expert_threshold"
    assert run.data.tags["version.mlflow"]
    assert run.data.tags["run_dir"] == str(session.run_dir)
    assert (run.info.run_name, run.info.status) == ("a-run", "FINISHED")


@pytest.mark.parametrize("layer_curves", [False, True])
def test_single_layers_are_in_mlflow_on_request_only(layer_curves: bool, store: str, tmp_path: Path):
    session = RunSession(tmp_path / "runs" / "deep", store, "an-experiment", None, 1.0, {}, layer_curves)
    for step in range(3):
        layers = {f"routing/layer_{layer:02d}/max_load": 1.5 for layer in range(20)}
        expert = {"routing/layer_03/load/expert_07": 0.5}  # there because somebody asked for it
        session.log_metrics(step, {"train/loss": 1.0, "routing/max_load": 1.5, **layers, **expert})
    session.end("FINISHED")

    uploader(session).sync()

    names = {name for _, name, _ in stored_points(session)}
    recorded = {name for _, name, _ in recorded_points(session)}
    few = {"train/loss", "routing/max_load", "routing/layer_03/load/expert_07"}
    assert len(recorded) == 23
    assert names == (recorded if layer_curves else few)
    session.close()


def test_times_are_those_of_the_run_not_of_the_upload(session: RunSession):
    session.log_metrics(0, {"loss": 1.0})
    session.end("FINISHED")
    journal = [json.loads(line) for line in (session.run_dir / "tracking.jsonl").read_text().splitlines()]

    state = upload(session.run_dir)

    info = stored_run(session).info
    assert info.start_time == int(journal[0]["time"] * 1000)
    assert info.end_time == int(journal[-1]["time"] * 1000)
    point = MlflowClient(session.tracking_uri).get_metric_history(state.run_id, "loss")[0]
    assert point.timestamp == int(read_metrics(session.run_dir)[0]["time"] * 1000)


def test_sending_twice_changes_nothing(session: RunSession):
    for step in range(5):
        session.log_metrics(step, {"loss": 1.0, "nan": math.nan})
    session.log_event("params", params={"a": "1"})
    session.end("FAILED")
    uploader(session).sync()
    before = stored_run(session)

    path = session.run_dir / "mlflow_run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sent_metrics": 0, "sent_journal": 0}))
    uploader(session).sync()

    after = stored_run(session)
    client = MlflowClient(session.tracking_uri)
    assert len(client.get_metric_history(after.info.run_id, "loss")) == 5
    assert len(client.get_metric_history(after.info.run_id, "nan")) == 5
    assert (after.info.to_proto(), after.data.params, after.data.tags) == (
        before.info.to_proto(),
        before.data.params,
        before.data.tags,
    )


def test_a_batch_has_no_limit_that_a_run_could_meet(session: RunSession):
    wide = {f"expert_{i}": float(i) for i in range(1200)}
    session.log_metrics(0, wide)
    session.log_metrics(1, {"loss": 1.0})
    session.log_event("params", params={f"key_{i}": str(i) for i in range(250)})
    session.log_event("tags", tags={f"tag_{i}": str(i) for i in range(250)})

    uploader(session).sync()

    run = stored_run(session)
    assert run.data.metrics == {**wide, "loss": 1.0}
    assert run.data.params == {f"key_{i}": str(i) for i in range(250)}
    assert run.data.tags.items() >= {f"tag_{i}": str(i) for i in range(250)}.items()


def test_long_values_are_cut_in_sight(session: RunSession):
    session.log_event("params", params={"long": "x" * 7000, "fits": "y" * 6000})
    session.log_event("tags", tags={"long": "z" * 9000})
    uploader(session).sync()
    data = stored_run(session).data
    assert len(data.params["long"]) == 6000
    assert data.params["long"].endswith("xxx … [cut, 7000 characters in all]")
    assert data.params["fits"] == "y" * 6000
    assert data.tags["long"].endswith("zzz … [cut, 9000 characters in all]")


def test_not_a_number_is_logged_as_such(session: RunSession):
    session.log_metrics(0, {"loss": 2.0, "norm": 1.0})
    session.log_metrics(1, {"loss": math.nan, "norm": math.inf})
    session.log_metrics(2, {"loss": 3.0, "norm": -math.inf})
    uploader(session).sync()
    client, state = MlflowClient(session.tracking_uri), read_state(session.run_dir)
    assert state
    loss = [point.value for point in client.get_metric_history(state.run_id, "loss")]
    norm = [point.value for point in client.get_metric_history(state.run_id, "norm")]
    assert loss[::2] == [2.0, 3.0]
    assert math.isnan(loss[1])
    assert norm[0] == 1.0
    assert norm[1] == -norm[2] == 1.7976931348623157e308  # MLflow's database has no infinity


def test_a_resumed_run_is_the_same_run_and_its_changed_parameters_become_tags(session: RunSession):
    session.log_event("params", params={"lr": "0.1", "seed": "1"})
    session.end("KILLED")
    first = uploader(session).sync()
    end = stored_run(session).info.end_time

    resumed = RunSession(session.run_dir, session.tracking_uri, session.experiment_name, None, 1.0, {})
    resumed.log_event("params", params={"lr": "0.2", "seed": "1", "max_steps": "5"})
    second = uploader(resumed).sync()

    run = stored_run(session)
    assert second.run_id == first.run_id
    assert run.info.status == "RUNNING"
    assert run.data.params == {"lr": "0.1", "seed": "1", "max_steps": "5"}
    assert run.data.tags["changed.lr"] == "0.2"
    assert "changed.seed" not in run.data.tags
    resumed.end("FINISHED")
    uploader(resumed).sync()
    assert stored_run(session).info.status == "FINISHED"
    assert stored_run(session).info.end_time > end


def test_a_rewound_record_is_sent_on_from_the_cut_even_after_it_grew_past_what_was_sent(session: RunSession):
    for step in range(10):
        session.log_metrics(step, {"loss": float(step)})
    sender = uploader(session)
    sender.sync()

    session.rewind(4)
    for step in range(4, 20):
        session.log_metrics(step, {"loss": 100.0 + step})
    sender.sync()

    assert recorded_points(session) == [(step, "loss", step + (100.0 if step >= 4 else 0.0)) for step in range(20)]
    abandoned = [(step, "loss", float(step)) for step in range(4, 10)]  # MLflow cannot forget
    assert stored_points(session) == sorted(recorded_points(session) + abandoned)


def test_a_cut_that_was_sent_is_not_applied_again(session: RunSession):
    session.log_metrics(0, {"loss": 0.0})
    session.rewind(0)
    sender = uploader(session)
    session.log_metrics(0, {"loss": 1.0})
    sender.sync()
    (session.run_dir / "metrics.jsonl").write_text("")  # were it read again from the start, it would never catch up
    sent = sender.sync().sent_metrics
    assert sent > 0


def test_a_run_that_mlflow_does_not_know_becomes_a_new_run_with_everything(
    session: RunSession, tmp_path: Path, empty_store: Path
):
    session.log_metrics(0, {"loss": 1.0})
    session.log_event("params", params={"lr": "0.1"})
    old = uploader(session).sync()
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())  # someone began the database anew
    session.log_metrics(1, {"loss": 2.0})

    notes: list[str] = []
    new = uploader(session, notes).sync()

    assert new.run_id != old.run_id
    assert stored_points(session) == [(0, "loss", 1.0), (1, "loss", 2.0)]
    assert stored_run(session).data.params == {"lr": "0.1"}
    assert len(notes) == 1
    assert old.run_id in notes[0]


def test_a_run_that_vanishes_under_a_running_upload_is_made_again(
    session: RunSession, tmp_path: Path, empty_store: Path
):
    import sqlite3

    session.log_metrics(0, {"loss": 1.0})
    sender = uploader(session)
    old = sender.sync()
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        for table in ("metrics", "latest_metrics", "tags", "params", "runs"):
            database.execute(f"DELETE FROM {table}")
    session.log_metrics(1, {"loss": 2.0})

    with pytest.raises(MlflowException):
        sender.sync()
    new = sender.sync()

    assert new.run_id != old.run_id
    assert stored_points(session) == [(0, "loss", 1.0), (1, "loss", 2.0)]


def test_a_run_deleted_by_a_person_is_neither_written_nor_made_again(session: RunSession):
    session.log_metrics(0, {"loss": 1.0})
    sender = uploader(session)
    run_id = sender.sync().run_id
    client = MlflowClient(session.tracking_uri)
    client.delete_run(run_id)
    session.log_metrics(1, {"loss": 2.0})

    for attempt in (sender, uploader(session)):
        with pytest.raises(MlflowException, match="is deleted in MLflow: restore it"):
            attempt.sync()

    client.restore_run(run_id)
    sender.sync()
    assert stored_points(session) == [(0, "loss", 1.0), (1, "loss", 2.0)]


def test_a_deleted_experiment_is_named(session: RunSession):
    client = MlflowClient(session.tracking_uri)
    client.delete_experiment(client.create_experiment(session.experiment_name))
    session.log_metrics(0, {"loss": 1.0})
    with pytest.raises(UserError, match=r"'an-experiment' is deleted: choose another tracking.experiment_name"):
        upload(session.run_dir)


def test_what_mlflow_refuses_does_not_hold_up_the_rest(session: RunSession, tmp_path: Path):
    session.log_metrics(0, {"acc@1": 0.5, "loss": 1.0})
    session.log_event("params", params={"a[0]": "1"})
    session.log_event("artifact", path="gone.txt", folder=None)
    session.log_event("tags", tags={"routing": "dense"})
    session.end("FINISHED")

    notes: list[str] = []
    uploader(session, notes).sync()

    run = stored_run(session)
    assert run.data.metrics == {"loss": 1.0}
    assert run.data.tags["routing"] == "dense"
    assert run.info.status == "FINISHED"
    assert "refuses parameters" in notes[0]
    assert "gone.txt is not in MLflow" in notes[1]
    assert len(notes) == 2


def test_artifacts_lie_beside_the_store_and_nothing_in_the_working_directory(
    session: RunSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    session.log_metrics(0, {"loss": 1.0})
    (session.run_dir / "config.yaml").write_text("seed: 1\n")
    session.log_event("artifact", path="config.yaml", folder=None)
    (tmp_path / "other.txt").write_text("from outside")
    session.log_artifact(tmp_path / "other.txt", "notes")

    state = uploader(session).sync()

    artifacts = tmp_path / "mlartifacts" / state.run_id / "artifacts"
    assert (artifacts / "config.yaml").read_text() == "seed: 1\n"
    assert (artifacts / "notes" / "other.txt").read_text() == "from outside"
    assert list(elsewhere.iterdir()) == []


def test_another_store_gets_the_whole_run(session: RunSession, tmp_path: Path, empty_store: Path):
    session.log_metrics(0, {"loss": 1.0})
    session.end("FINISHED")
    upload(session.run_dir)
    other = f"sqlite:///{tmp_path / 'other.db'}"
    (tmp_path / "other.db").write_bytes(empty_store.read_bytes())

    state = upload(session.run_dir, tracking_uri=other, experiment_name="elsewhere")

    run = MlflowClient(other).get_run(state.run_id)
    assert run.data.metrics == {"loss": 1.0}
    assert run.info.status == "FINISHED"
    assert MlflowClient(other).get_experiment(run.info.experiment_id).name == "elsewhere"


def test_a_run_abandoned_by_its_training_process_is_killed_but_a_living_one_is_not(session: RunSession):
    session.log_metrics(0, {"loss": 1.0})
    upload(session.run_dir)
    assert stored_run(session).info.status == "RUNNING"

    session._close_files()  # all that the kernel does for a killed process
    upload(session.run_dir)
    assert stored_run(session).info.status == "KILLED"


def test_upload_explains_what_it_cannot_do(tmp_path: Path, session: RunSession):
    with pytest.raises(UserError, match=r"holds no run: tracking.jsonl is missing or empty"):
        upload(tmp_path)
    session.log_metrics(0, {"loss": 1.0})
    (session.run_dir / "mlflow_run.json").write_text("{")
    with pytest.raises(UserError, match=r"mlflow_run.json: is not JSON: .* delete it"):
        upload(session.run_dir)


def test_upload_asks_for_a_password_that_was_not_kept(tmp_path: Path):
    session = RunSession(tmp_path / "run", "postgresql://me:secret@db/mlflow", "e", None, 1.0, {})
    session.log_metrics(0, {"loss": 1.0})
    session.end("FINISHED")
    assert all("secret" not in path.read_text() for path in session.run_dir.iterdir())
    with pytest.raises(UserError, match=r"postgresql://me:\*\*\*@db/mlflow.: its password is not kept"):
        upload(session.run_dir)


def test_two_uploads_at_once_do_not_mix(session: RunSession):
    import fcntl

    session.log_metrics(0, {"loss": 1.0})
    with (session.run_dir / "tracking.jsonl").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being sent by another process"):
            upload(session.run_dir)
    upload(session.run_dir)
