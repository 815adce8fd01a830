"""The logger: everything goes to files at once, and from there to MLflow. Training never waits for MLflow."""

import json
import logging
import sys
import weakref
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_moe.atomic import write_atomically
from lightning_moe.config.yaml_text import redacted_yaml
from lightning_moe.errors import RunStopped, UserError
from lightning_moe.filenames import CONFIG_FILE
from lightning_moe.redaction import redact, redact_all
from lightning_moe.tracking.files import RESERVED_METRIC_NAMES, is_valid_name
from lightning_moe.tracking.session import RunSession
from lightning_moe.tracking.state import RunState, read_state
from lightning_moe.tracking.store import resolve_uri, run_url, ui_command
from lightning_moe.trust import config_fact, folder_fact, remember

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


class MLflowLogger(Logger):
    """Records a run in its directory, and brings MLflow up to date with it in the background.

    Metrics are in `metrics.jsonl` of the run's directory as soon as they are logged. A separate process sends them, the
    parameters, tags and artifacts to MLflow every few seconds (decision 33). If the store is away or hangs, it warns
    once, keeps trying, and sends the backlog when the store is back. Training does not notice: a call costs one write
    to a file. `lightning_moe.tracking.upload` later sends what MLflow lacks in the end.

    Call `bind` before anything is logged. Only global rank zero writes; elsewhere every call does nothing.

    Args:
        enabled: whether MLflow gets the run; otherwise the record is on disk only, and can be uploaded later.
        tracking_uri: MLflow server (``http://…``) or database (``sqlite:///…``, ``postgresql://…``). Null takes the
            environment variable MLFLOW_TRACKING_URI, and without one ``sqlite:///mlflow.db`` in the working directory.
        experiment_name: MLflow experiment; it is made if it is missing.
        tags: further tags of the run.
        flush_seconds: pause between two uploads.
        finalize_seconds: longest wait for MLflow after training.
        layer_curves: whether MLflow gets the values of single layers (``routing/layer_03/…``) too, twenty curves per
            layer. The run's own record always has them.

    Raises:
        UserError: MLflow cannot work with a setting.
    """

    def __init__(
        self,
        enabled: bool = True,
        tracking_uri: str | None = None,
        experiment_name: str = "lightning_moe",
        tags: dict[str, str] | None = None,
        flush_seconds: float = 5.0,
        finalize_seconds: float = 30.0,
        layer_curves: bool = False,
    ) -> None:
        super().__init__()
        if not experiment_name.strip() or len(experiment_name) > 500:
            raise UserError(f"tracking.experiment_name is {experiment_name!r}: must have 1 to 500 characters")
        for name, value, least in (
            ("flush_seconds", flush_seconds, 0.1),
            ("finalize_seconds", finalize_seconds, 0.0),
        ):
            if not least <= value < float("inf"):
                raise UserError(f"tracking.{name} is {value}: must be at least {least:g}")
        _check_tags(tags or {}, "tracking.tags")
        self._tracking_uri = resolve_uri(tracking_uri, complete=enabled)
        self._experiment_name = experiment_name
        self._tags = {name: str(value) for name, value in (tags or {}).items()}
        self._flush_seconds = flush_seconds if enabled else None
        self._finalize_seconds = finalize_seconds
        self._layer_curves = layer_curves
        self._session: RunSession | None = None
        self._last_step = 0
        self._known_names: set[str] = set()

    def bind(self, run_dir: str | Path, beside: str = "") -> None:
        """Set the run's directory, ``<output_dir>/<run_name>``; its name is the run's name in MLflow.

        With ``beside``, the record goes into the experiment ``<experiment>: <beside>``, out of the table of runs.

        Nothing is written before the first thing is logged. A directory that already holds a run continues it.
        """
        self._session = RunSession(
            Path(run_dir).absolute(),
            self._tracking_uri,
            f"{self._experiment_name}: {beside}" if beside else self._experiment_name,
            self._flush_seconds,
            self._finalize_seconds,
            self._tags,
            self._layer_curves,
        )
        weakref.finalize(self, self._session.close)  # at the latest when the interpreter ends

    @property
    def run_dir(self) -> Path:
        """The run's directory (absolute)."""
        return self._bound.run_dir

    @property
    def name(self) -> str:
        """The run's name."""
        return self.run_dir.name

    @property
    def version(self) -> None:
        """A run has no versions: resuming continues it."""
        return None

    @property
    def save_dir(self) -> str:
        """The run's directory; Lightning's `Trainer.log_dir`."""
        return str(self.run_dir)

    log_dir = save_dir

    @property
    def state(self) -> RunState | None:
        """Ids of the run in MLflow, and how much it has; `None` until MLflow has seen the run."""
        return read_state(self.run_dir)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record one value per name, at an optimizer step.

        MLflow refuses some names. Such a metric is kept on disk only, with one warning per name.

        Args:
            metrics: numbers or scalar tensors by name; NaN and infinities are recorded as such.
            step: optimizer step; `None` means that of the last call.
        """
        self._last_step = self._last_step if step is None else int(step)
        if not metrics.keys() <= self._known_names:
            self._look_at_names(metrics)
        line = {name: float(value) for name, value in metrics.items() if name not in RESERVED_METRIC_NAMES}
        self._bound.log_metrics(self._last_step, line)

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Record parameters; nested mappings become dotted names."""
        values = vars(params) if isinstance(params, Namespace) else params
        self._bound.log_event("params", params=flatten(redact_all(values)))

    @rank_zero_only
    def log_config(self, text: str) -> None:
        """Record the composed configuration: `config.yaml` of the run, and each key as a parameter.

        Args:
            text: YAML. A password in a URL is replaced by ``***``.
        """
        self.log_hyperparams(yaml.safe_load(text))
        path = self.run_dir / CONFIG_FILE
        kept = redacted_yaml(text)
        write_atomically(path, kept.encode())
        remember(config_fact(kept))
        remember(folder_fact(self.run_dir))
        self.log_artifact(path)

    @rank_zero_only
    def log_tags(self, tags: Mapping[str, Any]) -> None:
        """Record tags, as text. A tag keeps its last value."""
        _check_tags(tags, "tags")
        self._bound.log_event("tags", tags={name: redact(str(value)) for name, value in tags.items()})

    @rank_zero_only
    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Record a file that MLflow gets in ``folder`` of the run's artifacts; it must exist until it is sent.

        A file from outside of the run's directory is copied into it.
        """
        self._bound.log_artifact(Path(path), folder)

    @rank_zero_only
    def log_figure(self, figure: "Figure", name: str) -> None:
        """Save a figure as `figures/<name>.png` of the run; MLflow gets it under the same name.

        On a full disk the figure is left out, with a warning.
        """
        from lightning_moe.report.figures import png

        if not is_valid_name(name):
            raise ValueError(f"figure name {name!r}: {_NAME_RULE}")
        path = self.run_dir / "figures" / f"{name}.png"
        if self._bound.save(path, png(figure, as_it_is=True)):
            self.log_artifact(path, str(path.parent.relative_to(self.run_dir)))

    @rank_zero_only
    def flush(self) -> None:
        """Wait until everything recorded is on the disk, but not for MLflow."""
        self._bound.flush()

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Continue from optimizer step ``step``, and drop metrics of that step or later from the disk.

        MLflow cannot forget. There the points of the abandoned attempt stay beside the new ones, with an older time.
        The tag ``resumed_from_step`` says so.
        """
        if self._bound.rewind(step):
            self.log_tags({"resumed_from_step": step})

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Record how the run ended, and wait for MLflow, ``finalize_seconds`` at most.

        A failure by Ctrl-C or SIGTERM is recorded as ``KILLED``. The tag ``error`` names any other error. A run
        that was refused before anything was logged keeps the record it had.

        Args:
            status: Lightning's ``success`` or ``failed``.
        """
        if self._session is None or not self._session.started:
            return
        error = None if status == "success" else sys.exception()
        stopped = isinstance(error, KeyboardInterrupt | SIGTERMException | RunStopped)
        if error and not stopped:
            self.log_tags({"error": f"{type(error).__name__}: {error}".partition("\n")[0]})
        self._session.end("FINISHED" if status == "success" else "KILLED" if stopped else "FAILED")

    @rank_zero_only
    def close(self) -> None:
        """Send what was logged after `finalize`, and end the uploading process. This happens by itself at exit."""
        self._bound.close()

    def ui_command(self) -> str | None:
        """Return the command that shows MLflow's pages for this store; `None` if the store is a server already."""
        return ui_command(self._tracking_uri)

    def run_url(self, port: int = 5000) -> str | None:
        """Return the address of the run's page; `None` until MLflow knows the run."""
        state = self.state
        return None if state is None else run_url(self._tracking_uri, state.experiment_id, state.run_id, port)

    @property
    def _bound(self) -> RunSession:
        if self._session is None:
            raise RuntimeError("MLflowLogger.bind(run_dir) must be called before it is used")
        return self._session

    def _look_at_names(self, metrics: Mapping[str, float]) -> None:
        for name in metrics.keys() - self._known_names:
            self._known_names.add(name)
            if name in RESERVED_METRIC_NAMES:
                log.warning("metric %r is not recorded: the name is that of a column of metrics.jsonl", name)
            elif not is_valid_name(name):
                log.warning("metric %r is recorded in metrics.jsonl but not in MLflow: %s", name, _NAME_RULE)


_NAME_RULE = "a name has letters, digits and _-.: or spaces, in parts joined by / as in a path, 250 characters at most"


def _check_tags(tags: Mapping[str, Any], where: str) -> None:
    for name in tags:
        if not is_valid_name(name):
            raise UserError(f"{where}: {name!r} is no name for a tag: {_NAME_RULE}")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested parameters as dotted names and text.

    Text stays as it is; other values are written as JSON. A mapping that is empty, or has a key that cannot be part of
    a name, is kept whole, as one value.
    """
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and all(is_valid_name(f"{name}.{inner}") for inner in value):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat
