"""Bringing MLflow up to date with a run's record on disk.

Everything that MLflow gets comes from the files of the run (see `files`), and `mlflow_run.json` says how much of them
it already has. So sending can stop at any point, be repeated, or begin weeks later in another process. What is sent
twice has the same time and value, and MLflow keeps it once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_moe.file_locks import take_lock
from lightning_moe.filenames import JOURNAL_FILE, METRICS_FILE
from lightning_moe.redaction import redact
from lightning_moe.tracking.files import (
    LONGEST_TAG,
    RESERVED_METRIC_NAMES,
    decode_metric,
    is_of_layer,
    is_valid_name,
    read_events,
    read_metric_lines,
)
from lightning_moe.tracking.state import RunState, read_state
from lightning_moe.tracking.store import connect
from lightning_moe.trust import stays_inside

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

METRICS_PER_CALL = 1000
NAMES_PER_CALL = 100
LONGEST_PARAM = 6000


class RunUploader:
    """A sender of what a store lacks of one run; see `sync`.

    Args:
        run_dir: directory of the run; its name is the run's name.
        tracking_uri: MLflow's store, as `store.resolve_uri` gives it.
        experiment_name: experiment that the run belongs to.
        report: function that is called with a sentence for a person, if something needs attention.
    """

    def __init__(
        self, run_dir: Path, tracking_uri: str, experiment_name: str, report: Callable[[str], None] = print
    ) -> None:
        self.run_dir = run_dir
        self.tracking_uri = tracking_uri
        self.experiment_name = experiment_name
        self._report = report
        self._client: Any = None
        self._experiment_id = ""
        self._known_run_id: str | None = None

    def sync(self) -> RunState:
        """Send everything that the record holds now and the store lacks.

        Raises:
            mlflow.exceptions.MlflowException: the store does not answer; what was sent until then counts.
            BlockingIOError: another process is sending this run at this moment.
        """
        with _exclusive(self.run_dir / JOURNAL_FILE):
            # The events are read before the metrics. So what was logged before an event is also sent before it.
            state = read_state(self.run_dir)
            events = list(read_events(self.run_dir / JOURNAL_FILE))
            state = self._open_run(state, events)
            state = self._apply_cuts(state, events)
            state = self._send_metrics(state, _sends_layers(events))
            return self._send_events(state, events)

    def _open_run(self, state: RunState | None, events: Sequence[tuple[dict[str, Any], int]]) -> RunState:
        from mlflow.exceptions import MlflowException

        if self._client is None:
            self._client, self._experiment_id = connect(self.tracking_uri, self.experiment_name)
        if state is not None and state.tracking_uri == redact(self.tracking_uri):
            if state.run_id == self._known_run_id:
                return state
            try:
                self._client.get_run(state.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                self._report(f"MLflow no longer knows run {state.run_id}: the whole record is sent as a new run")
            else:
                self._known_run_id = state.run_id
                return state
        run = self._client.create_run(
            self._experiment_id,
            start_time=_milliseconds(events[0][0]) if events else None,
            run_name=self.run_dir.name,
        )
        self._known_run_id = run.info.run_id
        state = RunState(redact(self.tracking_uri), self.experiment_name, self._experiment_id, run.info.run_id)
        return self._save(state)

    def _apply_cuts(self, state: RunState, events: Sequence[tuple[dict[str, Any], int]]) -> RunState:
        """Continue from where a resumed run has cut its metrics, if that is before what was sent."""
        cuts = [event["size"] for event, end in events if end > state.sent_journal and event["event"] == "cut"]
        return replace(state, sent_metrics=min([state.sent_metrics, *cuts]))

    def _send_metrics(self, state: RunState, layer_curves: bool) -> RunState:
        batch: list[Metric] = []
        end = state.sent_metrics
        for record, line_end in read_metric_lines(self.run_dir / METRICS_FILE, state.sent_metrics):
            line = [metric for metric in _metrics_of(record) if layer_curves or not is_of_layer(metric.key)]
            if batch and len(batch) + len(line) > METRICS_PER_CALL:
                state = self._send_batch(state, batch, end)
                batch = []
            batch += line
            end = line_end
        return self._send_batch(state, batch, end)

    def _send_batch(self, state: RunState, batch: "list[Metric]", end: int) -> RunState:
        for start in range(0, len(batch), METRICS_PER_CALL):
            part = batch[start : start + METRICS_PER_CALL]
            self._send(state, f"{len(part)} metrics", self._client.log_batch, metrics=part)
        return self._save(replace(state, sent_metrics=end)) if end > state.sent_metrics else state

    def _send_events(self, state: RunState, events: Sequence[tuple[dict[str, Any], int]]) -> RunState:
        for event, end in events:
            if end > state.sent_journal:
                self._send_event(state, event)
                state = self._save(replace(state, sent_journal=end))
        return state

    def _send_event(self, state: RunState, event: dict[str, Any]) -> None:
        match event["event"]:
            case "start":
                self._send(state, "the status", self._client.update_run, status="RUNNING")
            case "end":
                self._send(
                    state,
                    "the status",
                    self._client.set_terminated,
                    status=event["status"],
                    end_time=_milliseconds(event),
                )
            case "tags":
                self._send_tags(state, event["tags"])
            case "params":
                self._send_params(state, event["params"])
            case "artifact":
                self._send_artifact(state, event["path"], event["folder"])

    def _send_params(self, state: RunState, params: dict[str, str]) -> None:
        """Send parameters. MLflow never changes one, so a parameter that changed becomes the tag ``changed.<name>``."""
        from mlflow.entities import Param

        params = {name: shorten(value, LONGEST_PARAM) for name, value in params.items()}
        known = self._client.get_run(state.run_id).data.params
        fresh = [Param(name, value) for name, value in params.items() if name not in known]
        for part in _parts(fresh):
            self._send(state, "parameters", self._client.log_batch, params=part)
        changed = {f"changed.{n}": v for n, v in params.items() if n in known and known[n] != v}
        self._send_tags(state, changed)

    def _send_tags(self, state: RunState, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        for part in _parts([RunTag(name, shorten(value, LONGEST_TAG)) for name, value in tags.items()]):
            self._send(state, "tags", self._client.log_batch, tags=part)

    def _send_artifact(self, state: RunState, name: str, folder: str | None) -> None:
        path = self.run_dir / name
        if not stays_inside(self.run_dir, name):  # the record may be somebody else's
            self._report(f"artifact {path} is not in MLflow: it lies outside of {self.run_dir}")
            return
        try:
            self._client.log_artifact(state.run_id, str(path), folder)
        except Exception as error:
            self._client.get_run(state.run_id)  # if there is no answer, this raises, and the artifact is tried again
            self._report(f"artifact {path} is not in MLflow: {describe(error)}")

    def _send(self, state: RunState, what: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Make one call for this run.

        What the store refuses for good is reported and skipped; otherwise nothing after it would ever arrive.
        """
        from mlflow.exceptions import MlflowException

        try:
            method(state.run_id, *args, **kwargs)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                self._known_run_id = None  # look again, next time
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            _check_active(self._client.get_run(state.run_id))
            self._report(f"MLflow refuses {what}, kept in {self.run_dir}: {describe(error)}")

    def _save(self, state: RunState) -> RunState:
        state.save(self.run_dir)
        return state


def describe(error: BaseException) -> str:
    """Return the first line of an error's message, without passwords."""
    return redact(str(error).strip().partition("\n")[0] or type(error).__name__)


def shorten(value: str, longest: int) -> str:
    """Cut ``value`` to at most ``longest`` characters, and mention the cut at its end."""
    if len(value) <= longest:
        return value
    note = f" … [cut, {len(value)} characters in all]"
    return value[: longest - len(note)] + note


def _metrics_of(record: dict[str, Any]) -> "list[Metric]":
    from mlflow.entities import Metric

    return [
        Metric(name, decode_metric(value), _milliseconds(record), record["step"])
        for name, value in record.items()
        if name not in RESERVED_METRIC_NAMES and is_valid_name(name)
    ]


def _check_active(run: "Run") -> None:
    """Refuse to write to a run that a person has deleted."""
    from mlflow.exceptions import MlflowException

    if run.info.lifecycle_stage != "active":
        raise MlflowException(f"run {run.info.run_id} is deleted in MLflow: restore it there to continue")


def _sends_layers(events: Sequence[tuple[dict[str, Any], int]]) -> bool:
    """Return whether the run's last start asked for the values of single layers."""
    starts = [event for event, _ in events if event["event"] == "start"]
    return bool(starts and starts[-1].get("layer_curves"))


def _milliseconds(record: dict[str, Any]) -> int:
    return int(record["time"] * 1000)


def _parts(items: list[Any]) -> Iterator[list[Any]]:
    return (items[start : start + NAMES_PER_CALL] for start in range(0, len(items), NAMES_PER_CALL))


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("rb") as file:
        if take_lock(file.fileno(), file.name) is False:
            raise BlockingIOError(f"{path} is in use")
        yield
