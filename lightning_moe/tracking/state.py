"""`mlflow_run.json`: which MLflow run a directory belongs to, and how much of the record MLflow already has."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from lightning_moe.atomic import write_atomically
from lightning_moe.errors import UserError
from lightning_moe.file_schema import read_json
from lightning_moe.filenames import MLFLOW_RUN_FILE

Bytes = Annotated[int, Interval(ge=0, lt=2**63)]


@dataclass(frozen=True)
class RunState:
    """The identity and the progress of an upload.

    Args:
        tracking_uri: MLflow's store, without password.
        experiment_name: name of the experiment.
        experiment_id: id of the experiment in the store.
        run_id: id of the run in the store.
        sent_metrics: number of bytes of `metrics.jsonl` that the store has.
        sent_journal: number of bytes of `tracking.jsonl` that the store has.
    """

    tracking_uri: str
    experiment_name: str
    experiment_id: str
    run_id: str
    sent_metrics: Bytes = 0
    sent_journal: Bytes = 0

    def save(self, run_dir: Path) -> None:
        """Save the state, atomically."""
        write_atomically(run_dir / MLFLOW_RUN_FILE, (json.dumps(asdict(self), indent=2) + "\n").encode())


def read_state(run_dir: Path) -> RunState | None:
    """Read the saved state; return `None` for a run that no store knows yet.

    Raises:
        UserError: the file is damaged.
    """
    path = run_dir / MLFLOW_RUN_FILE
    try:
        return read_json(path, RunState)
    except FileNotFoundError:
        return None
    except UserError as error:
        raise UserError(f"{error}; delete it, and the run is sent again as a new MLflow run") from None
