"""The folder of a sweep that somebody else has filled: it runs no code, and nothing is written through its links."""

from pathlib import Path

import pytest
import yaml
from small_sweep import DECAY, Make

from lightning_moe.errors import UserError
from lightning_moe.sweep.main import run_sweep
from lightning_moe.sweep.optuna_study import open_optuna_study
from lightning_moe.sweep.pool import Pool
from lightning_moe.sweep.trial import RunningTrial, TrialRun


def test_a_link_out_of_the_folder_is_not_written_through(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    sweep = make()
    sweep.folder.mkdir(parents=True)
    (tmp_path / "private").write_text("mine")
    (sweep.folder / "trial-0000-s1.log").symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match=r"trial-0000-s1\.log: is a link to .*private, out of a folder.*--name"):
        run_sweep(sweep)
    assert (tmp_path / "private").read_text() == "mine"
    assert [path.name for path in sweep.folder.iterdir()] == ["trial-0000-s1.log"]


def test_a_planted_configuration_of_a_trial_is_replaced(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may name any code; one that this user wrote stays, so that a trial goes on with it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    sweep = make()
    trial = open_optuna_study(sweep).optuna_study.ask()
    sweep.space.sample(trial)
    config = TrialRun.of(sweep, trial.number, 1).config
    planted = yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "planted.Harmful"}]}})
    config.write_text(planted)
    written = []
    for _ in range(2):
        with Pool[TrialRun](1) as pool:
            running = RunningTrial(sweep, trial, {}, pool)
            running.advance()
            running.drop()
        written.append((config.read_text(), config.stat().st_mtime_ns))
    assert written[0] == written[1]
    content = yaml.safe_load(written[0][0])
    assert content["model"]["routing"]["init_args"]["ema_decay"] == trial.params[DECAY]
    assert content["trainer"]["callbacks"] is None
