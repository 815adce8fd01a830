"""Recovery of runs that ended before MLflow had everything: send the rest, and record how they ended."""

import os
import shlex
from pathlib import Path
from typing import Any

from lightning_moe.errors import UserError
from lightning_moe.filenames import JOURNAL_FILE, METRICS_FILE
from lightning_moe.redaction import redact
from lightning_moe.tracking.files import LineFile, read_events, read_metric_lines
from lightning_moe.tracking.state import RunState
from lightning_moe.tracking.store import address_fact, is_own_address, resolve_uri
from lightning_moe.tracking.uploader import RunUploader, describe
from lightning_moe.trust import stays_inside


def upload(run_dir: str | Path, tracking_uri: str | None = None, experiment_name: str | None = None) -> RunState:
    """Send to MLflow what it lacks of a run that is kept in ``run_dir``.

    Args:
        run_dir: directory of the run.
        tracking_uri: MLflow's store; `None` means the one that the run was made for.
        experiment_name: experiment; `None` means the one that the run was made for.

    Raises:
        UserError: no run is kept there, or the store does not answer.
    """
    from mlflow.exceptions import MlflowException

    run_dir = Path(run_dir).absolute()
    start = next((event for event in reversed(_lifecycle(run_dir)) if event["event"] == "start"), None)
    if start is None:
        raise UserError(f"{run_dir / JOURNAL_FILE}: has no event 'start'")
    uri = resolve_uri(tracking_uri or _own_address(run_dir, str(start["tracking_uri"])))
    close_abandoned_run(run_dir)
    uploader = RunUploader(run_dir, uri, experiment_name or start["experiment_name"])
    try:
        return uploader.sync()
    except BlockingIOError:
        raise UserError(f"{run_dir} is being sent by another process: try again in a minute") from None
    except MlflowException as error:
        raise UserError(f"{redact(uri)} does not take the run: {describe(error)}") from error


def _own_address(run_dir: Path, recorded: str) -> str:
    """Return the store that a record names, if it is the user's own: a foreign one would get what is in the run."""
    if not is_own_address(recorded):
        raise UserError(
            f"{run_dir}: its record names the store {redact(recorded)}, which you have not used on this machine; if it "
            f"is yours, send it with: python -m lightning_moe.tracking {shlex.quote(str(run_dir))} "
            f"--tracking_uri {shlex.quote(redact(recorded))}"
        )
    own = os.environ.get("MLFLOW_TRACKING_URI")  # with the password that is not recorded
    return own if own and address_fact(own) == address_fact(recorded) else recorded


def close_abandoned_run(run_dir: Path) -> bool:
    """Write the end ``KILLED`` into the record of a run whose training process died without recording an end.

    Returns:
        Whether the run is over, now or before.
    """
    last = _lifecycle(run_dir)[-1]
    if last["event"] == "end":
        return True
    refuse_foreign_links(run_dir)
    metrics = LineFile(run_dir / METRICS_FILE)
    abandoned = metrics.try_lock()
    if abandoned:
        journal = LineFile(run_dir / JOURNAL_FILE)
        metrics.drop_partial_line()
        journal.drop_partial_line()
        times = [record["time"] for record, _ in read_metric_lines(run_dir / METRICS_FILE)]
        journal.append({"event": "end", "time": max([last["time"], *times]), "status": "KILLED"})
        journal.close()
    metrics.close()
    return abandoned


def refuse_foreign_links(run_dir: Path) -> None:
    """Refuse to write to a record through a link out of the run's directory: it may lead to a file of the user's."""
    for name in (METRICS_FILE, JOURNAL_FILE):
        if not stays_inside(run_dir, name):
            raise UserError(f"{run_dir / name}: is a link out of the run's directory; it is not written through")


def _lifecycle(run_dir: Path) -> list[dict[str, Any]]:
    events = [event for event, _ in read_events(run_dir / JOURNAL_FILE) if event["event"] in ("start", "end")]
    if not events:
        raise UserError(f"{run_dir} holds no run: {JOURNAL_FILE} is missing or empty")
    return events
