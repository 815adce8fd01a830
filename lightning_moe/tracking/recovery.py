"""Recovery of runs that ended before MLflow had everything: send the rest, and record how they ended."""

from pathlib import Path
from typing import Any

from lightning_moe.errors import UserError
from lightning_moe.filenames import JOURNAL_FILE, METRICS_FILE
from lightning_moe.redaction import redact
from lightning_moe.tracking.files import LineFile, read_lines
from lightning_moe.tracking.state import RunState
from lightning_moe.tracking.store import resolve_uri
from lightning_moe.tracking.uploader import RunUploader, describe


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
    start = [event for event in _lifecycle(run_dir) if event["event"] == "start"][-1]
    uri = resolve_uri(tracking_uri or start["tracking_uri"])
    close_abandoned_run(run_dir)
    uploader = RunUploader(run_dir, uri, experiment_name or start["experiment_name"])
    try:
        return uploader.sync()
    except BlockingIOError:
        raise UserError(f"{run_dir} is being sent by another process: try again in a minute") from None
    except MlflowException as error:
        raise UserError(f"{redact(uri)} does not take the run: {describe(error)}") from error


def close_abandoned_run(run_dir: Path) -> bool:
    """Write the end ``KILLED`` into the record of a run whose training process died without recording an end.

    Returns:
        Whether the run is over, now or before.
    """
    last = _lifecycle(run_dir)[-1]
    if last["event"] == "end":
        return True
    metrics = LineFile(run_dir / METRICS_FILE)
    abandoned = metrics.try_lock()
    if abandoned:
        journal = LineFile(run_dir / JOURNAL_FILE)
        metrics.drop_partial_line()
        journal.drop_partial_line()
        times = [record["time"] for record, _ in read_lines(run_dir / METRICS_FILE)]
        journal.append({"event": "end", "time": max([last["time"], *times]), "status": "KILLED"})
        journal.close()
    metrics.close()
    return abandoned


def _lifecycle(run_dir: Path) -> list[dict[str, Any]]:
    events = [event for event, _ in read_lines(run_dir / JOURNAL_FILE) if event["event"] in ("start", "end")]
    if not events:
        raise UserError(f"{run_dir} holds no run: {JOURNAL_FILE} is missing or empty")
    return events
