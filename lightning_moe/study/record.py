"""The study's own MLflow run, which holds its page; the trained runs are in the same experiment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from lightning_moe.config.compose import merge
from lightning_moe.study.spec import Study


def log_page(study: Study, written: Sequence[Path], description: str) -> str | None:
    """Send the page, its figures and the table to MLflow, always to one run, whose record is in the study's folder.

    Args:
        study: study of the page.
        written: files that `page.write_page` returned.
        description: text in Markdown that MLflow shows with the run.

    Returns:
        The run's address in MLflow; `None` if ``tracking.enabled`` is false, or the store did not answer.
    """
    tracking = OmegaConf.create(merge(study.base)).get("tracking") or OmegaConf.create()
    if not tracking.get("enabled", True):
        return None
    from lightning_moe.tracking.files import NOTE_TAG
    from lightning_moe.tracking.files_run import log_files
    from lightning_moe.tracking.store import resolve_uri

    files = {path: path.parent.name if path.suffix == ".png" else None for path in written}  # the page links images/…
    tags = {"study": study.name, "kind": "study", NOTE_TAG: description}
    return log_files(study.folder, resolve_uri(tracking.get("tracking_uri")), study.name, files, tags)
