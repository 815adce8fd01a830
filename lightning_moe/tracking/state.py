"""`mlflow_run.json`: which MLflow run a directory belongs to, and how much of the record MLflow already has."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_moe.atomic import write_atomically
from lightning_moe.errors import UserError
from lightning_moe.filenames import MLFLOW_RUN_FILE


@dataclass(frozen=True)
class RunState:
    """Identity and progress of an upload.

    Args:
        tracking_uri: the store, without password.
        experiment_name: the experiment's name.
        experiment_id: the experiment's id in the store.
        run_id: the run's id in the store.
        sent_metrics: bytes of `metrics.jsonl` that the store has.
        sent_journal: bytes of `tracking.jsonl` that the store has.
    """

    tracking_uri: str
    experiment_name: str
    experiment_id: str
    run_id: str
    sent_metrics: int = 0
    sent_journal: int = 0

    def save(self, run_dir: Path) -> None:
        """Write atomically."""
        write_atomically(run_dir / MLFLOW_RUN_FILE, (json.dumps(asdict(self), indent=2) + "\n").encode())


def read_state(run_dir: Path) -> RunState | None:
    """The saved state; null for a run that no store knows yet.

    Raises:
        UserError: the file is damaged.
    """
    path = run_dir / MLFLOW_RUN_FILE
    try:
        return RunState(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete it, and the run is sent again as a new MLflow run"
        ) from error
