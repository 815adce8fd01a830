"""How MLflow's pages show an experiment of ours: the columns of the table of runs, and the charts.

MLflow keeps a shared view as a tag of the experiment. An address that names the view opens the page with it.
"""

import json
from typing import Any

from lightning_moe.metrics.catalogue import CATALOGUE

METRICS = CATALOGUE.values()
VIEW = "lightning_moe"
_CHARTED = (
    f"{group}/{metric.name}" + ("/.+" if metric.per_domain else "")
    for metric in METRICS
    for group in metric.mlflow_charts
)
#: search over the charts' names that MLflow begins with; the search field brings the other charts
CHARTS = f"^({'|'.join(_CHARTED)})$"
COLUMNS = [
    "tags.`routing`",
    "tags.`seed`",
    "tags.`sampled`",
    *(f"metrics.`{group}/{metric.name}`" for metric in METRICS for group in metric.mlflow_columns),
]


def prepare_views(tracking_uri: str, server: str) -> dict[str, str]:
    """Save the view with every experiment that has runs.

    Args:
        tracking_uri: MLflow's store.
        server: address of the server, ``http://127.0.0.1:5000``.

    Returns:
        ``<name>, table`` and ``<name>, charts`` of each experiment, with their addresses; ``MLflow`` with the server's
        own address if no experiment has runs.
    """
    from lightning_moe.tracking.worker import set_environment

    set_environment()
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri)
    # Sorted by the loss and not by time, so that MLflow shows the trials of a sweep without a click on their parent.
    view = {"selectedColumns": COLUMNS, "orderByKey": "metrics.`val/loss`", "orderByAsc": True}
    content = json.dumps({**view, "chartsSearchFilter": CHARTS})
    addresses: dict[str, str] = {}
    experiments: list[Any] = client.search_experiments(order_by=["last_update_time DESC"])
    for experiment in experiments:
        identifier = experiment.experiment_id
        if not client.search_runs([identifier], max_results=1):
            continue
        if experiment.tags.get(f"mlflow.sharedViewState.{VIEW}") != content:
            client.set_experiment_tag(identifier, f"mlflow.sharedViewState.{VIEW}", content)
        page = f"{server}/#/experiments/{identifier}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"
        addresses[f"{experiment.name}, table"] = page
        addresses[f"{experiment.name}, charts"] = f"{page}&compareRunsMode=CHART"
    return addresses or {"MLflow": server}
