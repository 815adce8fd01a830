"""Where MLflow keeps its runs: the tracking URI, the experiment in it, and how to look at them."""

import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from lightning_moe.errors import UserError
from lightning_moe.file_locks import take_lock
from lightning_moe.redaction import is_redacted, redact
from lightning_moe.trust import is_known
from lightning_moe.user_paths import user_url

if TYPE_CHECKING:
    from mlflow import MlflowClient

URI_VARIABLE = "MLFLOW_TRACKING_URI"
DEFAULT_URI = "sqlite:///mlflow.db"
SERVER_SCHEMES = ("http", "https", "databricks")
DATABASE_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql")
_SQLITE = "sqlite:///"
_CREATION_SECONDS = 120.0


def resolve_uri(uri: str | None, complete: bool = True) -> str:
    """Return the given URI, else that of ``MLFLOW_TRACKING_URI`` in the environment, else ``sqlite:///mlflow.db``.

    A relative SQLite path is made absolute, from the working directory. A URI from a run's record, which has no
    password, gets it from ``MLFLOW_TRACKING_URI``.

    Args:
        uri: tracking URI; `None` for none.
        complete: whether the store will be used, so that its password is needed.

    Raises:
        UserError: MLflow cannot keep runs there, or the password is missing.
    """
    key, given = "tracking.tracking_uri", os.environ.get(URI_VARIABLE)
    if uri is not None and is_redacted(uri):
        if given is not None and redact(given) == uri:
            uri = given
        elif complete:
            raise UserError(
                f"{key} is {uri!r}: its password is not kept; give the whole URI, here or in {URI_VARIABLE}, "
                "or tracking.enabled=false"
            )
    if uri is None:
        uri, key = given or DEFAULT_URI, URI_VARIABLE if given else key
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme not in SERVER_SCHEMES + DATABASE_SCHEMES:
        raise UserError(
            f"{key} is {redact(uri)!r}: MLflow keeps runs in a database (such as {DEFAULT_URI}) "
            "or on a server (such as http://127.0.0.1:5000)"
        )
    if scheme != "sqlite":
        return uri
    if not uri.startswith(_SQLITE) or uri in (_SQLITE, _SQLITE + ":memory:"):
        raise UserError(f"{key} is {uri!r}: must name a file, such as {DEFAULT_URI}")
    path = Path(user_url(uri, key).removeprefix(_SQLITE)).absolute()
    if path.is_dir() or not _writable(path):
        raise UserError(f"{key} is {uri!r}: {path} must be a file that can be written")
    return f"{_SQLITE}{path}"


def password_environment(uri: str | None) -> dict[str, str]:
    """Return the environment that gives a child process the password that its configuration file does not have."""
    return {} if uri is None or redact(uri) == uri else {URI_VARIABLE: uri}


def _writable(path: Path) -> bool:
    existing = next(p for p in (path, *path.parents) if p.exists())
    return (existing == path or existing.is_dir()) and os.access(existing, os.W_OK)


def address_fact(uri: str) -> str:
    """Return the line about a store for `trust.remember`: without its password, and with an absolute path."""
    if uri.startswith(_SQLITE):
        uri = f"{_SQLITE}{Path(uri.removeprefix(_SQLITE)).absolute()}"
    return f"address {redact(uri)}"


def is_own_address(uri: str) -> bool:
    """Return whether a store that a file names is one that this user has used on this machine, or uses by default."""
    own = {address_fact(given) for given in (DEFAULT_URI, os.environ.get("MLFLOW_TRACKING_URI")) if given}
    return address_fact(uri) in own or is_known(address_fact(uri))


def sqlite_folder(uri: str) -> Path | None:
    """Return the folder of a SQLite store; `None` for another kind of store."""
    return Path(unquote(uri.removeprefix(_SQLITE))).parent if uri.startswith(_SQLITE) else None


def connect(uri: str, experiment_name: str) -> tuple["MlflowClient", str]:
    """Return a client of the store and the id of the experiment; both are created if they are missing.

    Artifacts of a SQLite store are beside it, in ``mlartifacts/``.

    Raises:
        mlflow.exceptions.MlflowException: the store does not answer, or the experiment is deleted.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    folder = sqlite_folder(uri)
    location = None if folder is None else (folder / "mlartifacts").as_uri()
    with _creation_lock(folder):
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(experiment_name)
        if experiment is None:
            try:
                return client, client.create_experiment(experiment_name, artifact_location=location)
            except MlflowException:
                experiment = client.get_experiment_by_name(experiment_name)  # another run was faster
                if experiment is None:
                    raise
    if experiment.lifecycle_stage == "deleted":
        raise MlflowException(
            f"experiment {experiment_name!r} is deleted: choose another tracking.experiment_name, or restore it with "
            f"`mlflow experiments restore -x {experiment.experiment_id}`"
        )
    return client, experiment.experiment_id


@contextmanager
def _creation_lock(folder: Path | None) -> Iterator[None]:
    """Let one process at a time in: two that create the same SQLite store at once destroy each other's tables.

    The lock is on the folder itself, so no lock file remains. Some network file systems refuse it; then the process
    that failed tries again later.
    """
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _CREATION_SECONDS
        while take_lock(fd, folder) is False and time.monotonic() < deadline:
            time.sleep(0.1)
        yield
    finally:
        os.close(fd)


def run_url(uri: str, experiment_id: str, run_id: str, port: int = 5000) -> str:
    """Return the address of a run's page: on its server, or on the one that `ui` starts."""
    server = redact(uri).rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{port}"
    # without the type, MLflow opens the page among those of GenAI
    return f"{server}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def ui_command(uri: str) -> str | None:
    """Return the command that shows MLflow's pages for this store; `None` for a server, which has an address.

    A password in the URI is not printed.
    """
    if uri.partition(":")[0] in SERVER_SCHEMES:
        return None
    command = "python -m lightning_moe ui"
    return command if uri == resolve_uri(None) else f"{command} --tracking_uri {shlex.quote(redact(uri))}"


def serve_command(uri: str, port: int = 5000) -> str | None:
    """Return the command that serves MLflow's pages for this store, on this machine only; `None` for a server.

    A password in the URI is not printed: the command then reads ``MLFLOW_TRACKING_URI``.
    """
    if uri.partition(":")[0] in SERVER_SCHEMES:
        return None
    mlflow = Path(sys.executable).with_name("mlflow")
    program = [str(mlflow)] if mlflow.exists() else [sys.executable, "-m", "mlflow"]
    store = shlex.quote(uri) if redact(uri) == uri else '"$MLFLOW_TRACKING_URI"'
    words = [*map(shlex.quote, program), "server", "--workers 1", "--host 127.0.0.1", f"--port {port}"]
    words.append(f"--backend-store-uri {store}")
    folder = sqlite_folder(uri)
    if folder is not None:
        words.append(f"--artifacts-destination {shlex.quote(str(folder / 'mlartifacts'))}")
    # The job service is off: training runs do not need its features, and it takes 9 s and 1.8 GB more.
    return "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false " + " ".join(words)
