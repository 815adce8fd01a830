"""Files that become an MLflow run of their own, such as the page of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning_moe.filenames import JOURNAL_FILE
from lightning_moe.tracking.session import RunSession
from lightning_moe.tracking.state import read_state
from lightning_moe.tracking.store import run_url

FLUSH_SECONDS, FINALIZE_SECONDS = 5.0, 30.0


def log_files(
    folder: Path, tracking_uri: str, experiment_name: str, files: Mapping[Path, str | None], tags: Mapping[str, str]
) -> str | None:
    """Send files to MLflow, and wait for it for half a minute at most.

    Args:
        folder: folder of the run's record. If it has a record already, that run gets the files too.
        tracking_uri: MLflow's store.
        experiment_name: experiment of the run.
        files: files, each with its folder among the run's artifacts; `None` means the top.
        tags: tags of the run.

    Returns:
        The run's address in MLflow; `None` if the store did not get everything (a warning says how to send the rest).
    """
    session = RunSession(folder.absolute(), tracking_uri, experiment_name, FLUSH_SECONDS, FINALIZE_SECONDS, tags)
    for path, artifact_folder in files.items():
        session.log_artifact(path, artifact_folder)
    session.end("FINISHED")
    session.close()
    state = read_state(folder)
    if state is None or state.sent_journal < (folder / JOURNAL_FILE).stat().st_size:
        return None
    return run_url(tracking_uri, state.experiment_id, state.run_id)
