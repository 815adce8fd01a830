"""Finished runs, from their folders or from MLflow."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning_moe.errors import UserError
from lightning_moe.filenames import CONFIG_FILE, JOURNAL_FILE, SUMMARY_FILE
from lightning_moe.metrics.catalogue import CATALOGUE
from lightning_moe.runs.config import read_config
from lightning_moe.runs.folder import routing_name
from lightning_moe.runs.summary import read_comparable_summary

#: how the numbers of a summary's layers become one
REDUCTIONS: dict[str, Callable[[Sequence[float]], float]] = {"max": max, "mean": fmean, "sum": sum}


@dataclass(frozen=True)
class FinishedRun:
    """A run as a comparison needs it.

    Args:
        source: folder of the run, or its id in MLflow.
        config: complete configuration.
        summary: content of ``summary.json``.
    """

    source: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]

    @property
    def seed(self) -> int:
        return int(self.config["seed_everything"])

    @property
    def routing(self) -> str:
        """Short name of the routing rule, such as ``expert_threshold``, or ``dense``."""
        routing = self.config["model"]["routing"]
        return routing_name(routing and routing["class_path"])

    def metric(self, name: str) -> float | None:
        """Return a metric of the catalogue from the summary; `None` if the run does not have it."""
        over_layers = CATALOGUE[name].over_layers
        if over_layers is not None:
            layers = [layer[name] for layer in self.summary.get("layers", {}).values() if layer.get(name) is not None]
            return float(REDUCTIONS[over_layers](layers)) if layers else None
        value = self.summary.get(name)
        return None if value is None else float(value)


def read_folders(paths: Sequence[Path]) -> tuple[list[FinishedRun], list[str]]:
    """Read the finished runs in folders, each run once. A folder is a run's own, or holds runs at any depth.

    Returns:
        The runs, and the folders of runs that did not finish.

    Raises:
        UserError: no such folder, or no run in it.
    """
    runs, unfinished = [], []
    seen: set[Path] = set()
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder")
        folders = sorted({file.parent for file in path.rglob(JOURNAL_FILE)})
        folders = [folder for folder in folders if (folder / CONFIG_FILE).is_file()]
        if not folders:
            raise UserError(f"{path}: holds no run (a run's folder has {CONFIG_FILE} and {JOURNAL_FILE})")
        for folder in folders:
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            if (folder / SUMMARY_FILE).is_file():
                runs.append(_read(str(folder), folder))
            else:
                unfinished.append(str(folder))
    return runs, unfinished


def read_experiment(tracking_uri: str, name: str, filter_string: str) -> tuple[list[FinishedRun], list[str]]:
    """Read the finished runs of an MLflow experiment.

    Args:
        tracking_uri: MLflow's store.
        name: name of the experiment.
        filter_string: filter in MLflow's language, such as ``tags.sweep = 'learning_rate'``; empty for all.

    Returns:
        The runs, and the names of runs that did not finish.

    Raises:
        UserError: no such experiment, a filter that MLflow does not understand, or no answer.
    """
    from lightning_moe.tracking.worker import set_environment

    set_environment()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient(tracking_uri)
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            known = ", ".join(sorted(repr(found.name) for found in client.search_experiments()))
            raise UserError(f"--experiment_name {name!r}: {tracking_uri} has no such experiment (it has {known})")
        found = list(_search(client, experiment.experiment_id, filter_string))
    except MlflowException as error:
        raise UserError(f"{tracking_uri}: {str(error).strip().splitlines()[0]}") from error
    runs, unfinished = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for run in found:
            if "kind" in run.data.tags:  # MLflow's run of a sweep or a comparison, not a training
                continue
            folder = Path(temporary) / run.info.run_id
            folder.mkdir()
            present = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
            if {CONFIG_FILE, SUMMARY_FILE} <= present:
                for file in (CONFIG_FILE, SUMMARY_FILE):
                    client.download_artifacts(run.info.run_id, file, str(folder))
                runs.append(_read(f"{run.info.run_name} ({run.info.run_id})", folder))
            else:
                unfinished.append(run.info.run_name)
    return runs, unfinished


def _search(client: Any, experiment_id: str, filter_string: str) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_runs([experiment_id], filter_string, order_by=["start_time ASC"], page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _read(source: str, folder: Path) -> FinishedRun:
    return FinishedRun(source, read_config(folder, source), read_comparable_summary(folder, source))
