"""Where a run of a sweep or a study is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFiles:
    """One ``fit`` of many.

    Args:
        folder: of all its runs.
        name: of this one.
    """

    folder: Path
    name: str

    @property
    def run(self) -> Path:
        """The run's own folder."""
        return self.folder / self.name

    @property
    def config(self) -> Path:
        """Its complete configuration, written before it starts."""
        return self.folder / f"{self.name}.yaml"

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.folder / f"{self.name}.log"
