"""Files of an analysis as artifacts of the MLflow run that a checkpoint comes from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from lightning_moe.errors import UserError
from lightning_moe.filenames import JOURNAL_FILE
from lightning_moe.tracking.files import LineFile, inside_run
from lightning_moe.tracking.recovery import refuse_foreign_links, upload
from lightning_moe.tracking.state import read_state

ARTIFACT_FOLDER = "analysis"


def attach(run_dir: Path, folder: Path, files: Sequence[Path]) -> str:
    """Record the files as artifacts of a run, and send them.

    They go into the run's own journal, like everything that MLflow gets. If the store is away, or the run is still
    training, they are sent later.

    Args:
        run_dir: folder of the run.
        folder: folder that the files' names in MLflow are relative to.
        files: files below ``folder``; they must exist until they are sent.

    Returns:
        One line that says what happened.
    """
    run_dir = run_dir.resolve()
    if read_state(run_dir) is None:
        return f"{run_dir.name}: MLflow does not know this run, so the files are on disk only"
    try:
        refuse_foreign_links(run_dir)
    except UserError as error:
        return f"{error}; the files are on disk only"
    try:
        with closing(LineFile(run_dir / JOURNAL_FILE)) as journal:
            journal.drop_partial_line()
            for file in files:
                name = str(Path(ARTIFACT_FOLDER) / file.relative_to(folder).parent)
                path = inside_run(run_dir, file, name)
                journal.append({"event": "artifact", "time": time.time(), "path": path, "folder": name})
    except OSError as error:
        return f"{run_dir.name}: its record cannot be written ({error}), so the files are on disk only"
    try:
        upload(run_dir)
    except UserError as error:
        return f"{run_dir.name}: not in MLflow yet ({error}); send later: python -m lightning_moe.tracking {run_dir}"
    return f"{run_dir.name}: in MLflow, under the run's artifacts, {ARTIFACT_FOLDER}/"
