"""The folder of a run that somebody else made: it runs no code, names no server, and sends no other files."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.small_run import Command

from lightning_moe.tracking.files import read_lines
from lightning_moe.trust import known_file

SMALL = ("--config", "small", "--run_name=a", "--trainer.max_steps=2")
CKPT = "--ckpt_path=runs/a/checkpoints/last.ckpt"


@pytest.fixture
def foreign(command: Command, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder on a machine whose user has never run anything."""
    assert command("fit", *SMALL)[0] == 0
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return workplace / "runs/a"


def change(run: Path, dotted: str, value: Any) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    node = config
    *path, last = dotted.split(".")
    for key in path:
        node = node[key]
    node[last] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))


DECIDING = {
    "tracking.tracking_uri": "http://127.0.0.1:9",
    "data.cache_dir": "/tmp/elsewhere",
    "trainer.callbacks": [
        {"class_path": "LambdaCallback", "init_args": {"on_train_start": {"class_path": "planted.Harmful"}}}
    ],
    "trainer.profiler": {"class_path": "SimpleProfiler", "init_args": {"dirpath": "/tmp/elsewhere"}},
    "trainer.plugins": ["planted.Plugin"],
    "tracking.experiment_name": "${oc.env:HOME}",
    "model.pretrained": {"path": "somebody/model"},
    "include": ["/etc/other.yaml"],
}


@pytest.mark.parametrize("key", DECIDING)
def test_its_configuration_does_not_decide_what_runs_and_where_data_go(
    key: str, foreign: Path, command: Command, workplace: Path
) -> None:
    (workplace / "planted.py").write_text("import pathlib\npathlib.Path('harmed').touch()\n")
    change(foreign, key, DECIDING[key])
    for name in ("fit", "validate", "predict"):
        code, _, err = command(name, CKPT, "--trainer.max_steps=3") if name == "fit" else command(name, CKPT)
        assert code == 2, (name, err)
        assert f"config.yaml: {key}" in err
        assert "was not written by you on this machine" in err
    assert not (workplace / "harmed").exists()


@pytest.mark.parametrize("key", ["trainer.callbacks", "data.corpus"])
def test_its_configuration_names_no_file_with_an_object(
    key: str, foreign: Path, command: Command, workplace: Path
) -> None:
    """Where an object is expected, jsonargparse reads it from a file, whose name needs neither dot nor slash."""
    callback = {"class_path": "LambdaCallback", "init_args": {"on_validation_start": "planted.harm"}}
    (workplace / "planted.py").write_text("import pathlib\npathlib.Path('harmed').touch()\n")
    (workplace / "innocent").write_text(yaml.safe_dump([callback]))
    change(foreign, key, "innocent")
    code, _, err = command("validate", CKPT)
    assert code == 2
    assert f"config.yaml: {key}='innocent'" in err
    assert not (workplace / "harmed").exists()


def test_a_plain_foreign_run_can_be_used(foreign: Path, command: Command) -> None:
    assert command("validate", CKPT)[0] == 0
    assert command("fit", CKPT, "--trainer.max_steps=3")[0] == 0


def test_naming_the_configuration_is_consent(foreign: Path, command: Command, workplace: Path) -> None:
    change(foreign, "data.cache_dir", os.environ["LIGHTNING_MOE_CACHE"])
    assert command("validate", CKPT)[0] == 2
    assert command("validate", CKPT, "--config=runs/a/config.yaml")[0] == 0


def test_ones_own_run_is_continued_with_its_own_settings(command: Command, workplace: Path) -> None:
    """The same settings, typed by this user before."""
    flags = (f"--data.cache_dir={os.environ['LIGHTNING_MOE_CACHE']}", "--tracking.tracking_uri=sqlite:///mine.db")
    assert command("fit", *SMALL, *flags)[0] == 0
    assert command("fit", "--ckpt_path=last", "--run_name=a", "--trainer.max_steps=3")[0] == 0
    assert command("validate", "--ckpt_path=last")[0] == 0
    file = known_file()
    assert file is not None
    assert file.stat().st_mode & 0o077 == 0


def test_a_link_out_of_a_foreign_folder_is_not_written_through(
    foreign: Path, command: Command, workplace: Path, tmp_path: Path
) -> None:
    private = tmp_path / "private"
    private.mkdir()
    shutil.move(foreign / "checkpoints", private / "checkpoints")
    (foreign / "checkpoints").symlink_to(private / "checkpoints")
    before = sorted(private.rglob("*"))
    code, _, err = command("fit", CKPT, "--trainer.max_steps=3")
    assert code == 2
    assert "checkpoints: is a link to" in err
    assert sorted(private.rglob("*")) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "tracking.jsonl", "evaluations", "predictions"])
def test_a_known_configuration_does_not_make_a_folder_ones_own(
    name: str, command: Command, workplace: Path, tmp_path: Path
) -> None:
    """The same settings give the same file to everybody, as with the quickstart."""
    assert command("fit", *SMALL)[0] == 0
    shutil.move(workplace / "runs/a", workplace / "theirs")
    private = tmp_path / "private"
    private.write_text("no newline") if name.endswith("jsonl") else private.mkdir()
    (workplace / "theirs" / name).unlink(missing_ok=True)
    (workplace / "theirs" / name).symlink_to(private)
    for line in (("fit", "--trainer.max_steps=3"), ("validate",), ("predict",)):
        code, _, err = command(line[0], "--ckpt_path=theirs/checkpoints/last.ckpt", *line[1:])
        assert code == 2, line
        assert f"{name}: is a link to" in err
    assert not private.is_dir() or [*private.iterdir()] == []
    assert private.is_dir() or private.read_text() == "no newline"


def test_ones_own_link_is_followed(command: Command, workplace: Path, tmp_path: Path) -> None:
    """Checkpoints on another disk."""
    assert command("fit", *SMALL)[0] == 0
    shutil.move(workplace / "runs/a/checkpoints", tmp_path / "disk")
    (workplace / "runs/a/checkpoints").symlink_to(tmp_path / "disk")
    assert command("fit", "--ckpt_path=last", "--run_name=a", "--trainer.max_steps=3")[0] == 0


def test_the_record_sends_no_file_from_outside_and_to_no_foreign_store(
    command: Command, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen once: a private key and a system file went to an address that the folder named."""
    from lightning_moe.errors import UserError
    from lightning_moe.tracking import upload
    from lightning_moe.tracking.store import connect

    assert command("fit", *SMALL, "--tracking.enabled=false")[0] == 0
    run, secret = workplace / "runs/a", workplace / "private_key"
    secret.write_text("secret")
    journal = [record for record, _ in read_lines(run / "tracking.jsonl")]
    for record in journal:
        if record["event"] == "start":
            record["tracking_uri"] = f"sqlite:///{tmp_path}/theirs.db"
    (run / "link").symlink_to(secret)
    journal += [{"event": "artifact", "time": 1.0, "path": path, "folder": None} for path in (str(secret), "link")]
    journal += [{"event": "artifact", "time": 1.0, "path": "../../private_key", "folder": None}]
    (run / "tracking.jsonl").write_text("".join(json.dumps(record) + "\n" for record in journal))

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with pytest.raises(UserError, match=r"theirs\.db, which you have not used on this machine.*--tracking_uri"):
        upload(run)
    assert not (tmp_path / "theirs.db").exists()
    uri = f"sqlite:///{workplace}/mine.db"
    state = upload(run, uri)
    client, _ = connect(uri, "lightning_moe")
    names = {artifact.path for artifact in client.list_artifacts(state.run_id)}
    assert "config.yaml" in names
    assert not {"private_key", "link"} & names


def test_a_file_from_elsewhere_is_copied_into_the_run(tmp_path: Path) -> None:
    from lightning_moe.tracking.files import inside_run

    run, other = tmp_path / "run", tmp_path / "figure.png"
    run.mkdir()
    other.write_bytes(b"picture")
    name = inside_run(run, other, "analysis")
    assert (name, (run / name).read_bytes()) == ("artifacts/analysis/figure.png", b"picture")
    assert inside_run(run, run / "config.yaml", None) == "config.yaml"


def test_the_record_is_not_written_through_a_link(foreign: Path, command: Command, workplace: Path) -> None:
    private = workplace / "private.txt"
    private.write_text("mine\n")
    (foreign / "metrics.jsonl").unlink()
    (foreign / "metrics.jsonl").symlink_to(private)
    code, _, err = command("fit", CKPT, "--trainer.max_steps=3")
    assert code == 2
    assert re.search(r"metrics.jsonl", err)
    assert private.read_text() == "mine\n"


def test_no_command_that_only_reads_writes_through_links_of_the_folder(
    foreign: Path, command: Command, workplace: Path, tmp_path: Path
) -> None:
    from lightning_moe.errors import UserError
    from lightning_moe.tracking.recovery import close_abandoned_run, refuse_foreign_links

    private = tmp_path / "private"
    private.mkdir()
    (foreign / "analysis").symlink_to(private)
    code, _, err = command("analyze", CKPT, "--no_mlflow")
    assert code == 2
    assert "is a link out of the run's folder" in err
    assert list(private.iterdir()) == []

    lines = (foreign / "tracking.jsonl").read_bytes()
    (private / "file").write_bytes(b"".join(line for line in lines.splitlines(True) if b'"end"' not in line))
    (foreign / "tracking.jsonl").unlink()
    (foreign / "tracking.jsonl").symlink_to(private / "file")
    before = (private / "file").read_bytes()
    for write in (refuse_foreign_links, close_abandoned_run):
        with pytest.raises(UserError, match="is a link out of the run's directory"):
            write(foreign)
    assert (private / "file").read_bytes() == before
