"""The sweep's own MLflow run, the parent of its trials' runs; the sweep's folder keeps its record."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from lightning_moe.atomic import write_atomically
from lightning_moe.config.compose import merge
from lightning_moe.config.yaml_text import redacted_yaml
from lightning_moe.errors import UserError
from lightning_moe.filenames import METRICS_FILE
from lightning_moe.redaction import redact
from lightning_moe.sweep import report
from lightning_moe.sweep.locks import LEADER
from lightning_moe.sweep.optuna_study import OpenOptunaStudy
from lightning_moe.sweep.pool import say
from lightning_moe.sweep.spec import Sweep
from lightning_moe.sweep.trials import best_value
from lightning_moe.tracking.files import NOTE_TAG, decode_metric, read_metric_lines
from lightning_moe.tracking.state import RunState, read_state
from lightning_moe.tracking.store import resolve_uri, run_url

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from lightning_moe.tracking.session import RunSession

PARENT = "mlflow_parent"  # user attribute of the Optuna study with the parent run, for other machines
PARENT_SECONDS = 120.0  # the longest wait for MLflow to give the parent run an id; making its database is slow
FINALIZE_SECONDS = 30.0  # the longest wait for MLflow at the end


class SweepRecord:
    """The sweep's record, which only the leader writes; at most one process of the sweep is the leader.

    Args:
        sweep: sweep to record.
        opened: Optuna study and locks of the sweep.
    """

    def __init__(self, sweep: Sweep, opened: OpenOptunaStudy) -> None:
        self._sweep, self._optuna_study, self._locks = sweep, opened.optuna_study, opened.locks
        tracking = OmegaConf.create(merge(sweep.base)).get("tracking") or OmegaConf.create()
        self._enabled = bool(tracking.get("enabled", True))
        self._uri = resolve_uri(tracking.get("tracking_uri"))
        self._experiment = str(tracking.get("experiment_name", "lightning_moe"))
        self._session: RunSession | None = None
        self._recorded: list[int] = []  # numbers of trials, in the order of their ends

    @property
    def child_tags(self) -> dict[str, str]:
        """Tags that put a trial's run below the sweep's in MLflow."""
        parent = self._optuna_study.user_attrs.get(PARENT)
        return {"sweep": self._sweep.name} | ({"mlflow.parentRunId": parent["run_id"]} if parent else {})

    def open(self) -> None:
        """Become the leader if nobody else is."""
        if self._session is not None or self._locks.in_grace_period() or not self._locks.try_lock(LEADER):
            return
        from lightning_moe.tracking.session import RunSession

        folder, parent = self._sweep.folder, self._optuna_study.user_attrs.get(PARENT)
        folder.mkdir(parents=True, exist_ok=True)
        if parent and read_state(folder) is None and parent["tracking_uri"] == redact(self._uri):
            RunState(**parent).save(folder)  # another machine began it
        self._recorded = _recorded_trials(folder / METRICS_FILE)
        tags = {"sweep": self._sweep.name, "kind": "sweep"}
        flush = 5.0 if self._enabled else None
        self._session = RunSession(folder.absolute(), self._uri, self._experiment, flush, FINALIZE_SECONDS, tags)
        write_atomically(folder / "sweep.yaml", redacted_yaml(self._sweep.path.read_text(encoding="utf-8")).encode())
        self._session.log_event("params", params=report.parameters(self._sweep))
        self._artifact("sweep.yaml")

    @property
    def is_leader(self) -> bool:
        """Whether this process keeps the record."""
        return self._session is not None

    def resign(self) -> None:
        """Leave the record to the process that took the leader's lock in an outage."""
        if self._session is not None:
            self._session.end("KILLED")
            self._session.close()
            self._session = None

    def wait_for_parent(self) -> None:
        """Wait until MLflow has given the sweep's run its id, so that the trials' runs can name it."""
        deadline = time.monotonic() + PARENT_SECONDS
        while self._enabled and PARENT not in self._optuna_study.user_attrs and time.monotonic() < deadline:
            self._announce_parent()
            time.sleep(0.1)
        if self._enabled and PARENT not in self._optuna_study.user_attrs:
            say(f"warning: MLflow at {redact(self._uri)} does not answer: the trials will not lie below one run")

    def _announce_parent(self) -> None:
        state = read_state(self._sweep.folder) if self._session else None
        if state is not None:
            self._optuna_study.set_user_attr(PARENT, {**vars(state), "sent_metrics": 0, "sent_journal": 0})

    def update(self) -> None:
        """Record the trials that ended since the last call."""
        self.open()
        if self._session is None:
            return
        if self._enabled and PARENT not in self._optuna_study.user_attrs:
            self._announce_parent()  # MLflow was slow at first: from now on trials are below the sweep's run
        trials = self._optuna_study.get_trials(deepcopy=False)
        ended = [t for t in trials if t.state.is_finished() and t.number not in self._recorded]
        for trial in sorted(ended, key=lambda trial: (trial.datetime_complete is None, trial.datetime_complete)):
            self._record(trial, [trials[number] for number in self._recorded])
        if ended:
            self._describe()

    def _describe(self) -> None:
        assert self._session is not None
        note = redact(report.description(self._sweep, self._optuna_study))
        self._session.log_event("tags", tags={NOTE_TAG: note})

    def _record(self, trial: FrozenTrial, before: list[FrozenTrial]) -> None:
        """Record a trial under the number of trials that ended before it, so that the best so far never gets worse."""
        assert self._session is not None
        self._recorded.append(trial.number)
        seconds = trial.duration.total_seconds() if trial.duration else math.nan
        metrics: dict[str, float] = {"sweep/trial": trial.number, "sweep/trial_seconds": seconds}
        for index, (metric, direction) in enumerate(self._sweep.objectives.items()):
            if trial.state.name == "COMPLETE":
                metrics[f"sweep/{metric}"] = trial.values[index]
            values = [t.values[index] for t in (*before, trial) if t.state.name == "COMPLETE"]
            if values:
                metrics[f"sweep/best/{metric}"] = best_value(values, direction)
        self._session.log_metrics(len(before), metrics)
        log = Path(str(trial.user_attrs.get("log"))).name  # the storage may name it, but not say where it is
        if trial.state.name == "FAIL" and (self._sweep.folder / log).is_file():
            self._session.log_artifact(self._sweep.folder / log, "failed")

    def finish(self, complete: bool) -> None:
        """Write the reports and end the record, if this process is the leader.

        Args:
            complete: whether the sweep is done; otherwise this process stops before that.
        """
        if self._session is None:
            return
        self.update()
        self._describe()  # also what an older version of this package recorded
        for path in report.write_reports(self._sweep, self._optuna_study):
            self._artifact(path)
        self._session.end("FINISHED" if complete else "KILLED")
        self._session.close()

    def address(self) -> str | None:
        """Return the address of the sweep's run in MLflow; `None` if MLflow does not know it."""
        state = read_state(self._sweep.folder) if self._enabled else None
        return None if state is None else run_url(self._uri, state.experiment_id, state.run_id)

    def _artifact(self, path: str) -> None:
        assert self._session is not None
        folder = path.rpartition("/")[0] or None
        self._session.log_event("artifact", path=path, folder=folder)


def _recorded_trials(path: Path) -> list[int]:
    """Return the trials in a sweep's record.

    Raises:
        UserError: a line has no whole number for its trial.
    """
    found = []
    for record, _ in read_metric_lines(path):
        number = decode_metric(record.get("sweep/trial", record["step"]))
        if not number.is_integer():
            raise UserError(f"{path}: sweep/trial={number:g}: must be the number of a trial")
        found.append(int(number))
    return found
