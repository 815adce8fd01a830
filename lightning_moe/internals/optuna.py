"""Parts of Optuna that are not in its documentation."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lightning_moe.errors import UserError
from lightning_moe.file_locks import take_lock

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial


def reopen_trial(optuna_study: Study, frozen: FrozenTrial) -> Trial:
    """Continue a RUNNING trial that another process began; ``Study.ask`` cannot take a number.

    The trial keeps its parameters and reported values.
    """
    from optuna.trial import Trial

    return Trial(optuna_study, frozen._trial_id)


def ignore_stop(optuna_study: Study) -> None:
    """Let samplers call ``Study.stop`` when nothing is left to try, an error outside of ``Study.optimize``."""
    optuna_study.stop = lambda: None  # type: ignore[method-assign]


class JournalKernelLock:
    """A lock for ``JournalFileBackend(lock_obj=…)`` that the kernel frees when its holder is killed.

    Optuna's own locks then stay for half a minute. Their base class is not public, so this class has the same two
    methods without inheriting from it.

    Args:
        path: file to lock; it is made if it is missing.
    """

    def __init__(self, path: str) -> None:
        self._path, self._fd = path, -1

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        if take_lock(self._fd, self._path, wait=True) is None:
            raise UserError(f"{self._path}: its file system has no locks; give a storage of another kind or place")
        return True

    def release(self) -> None:
        """Free the lock."""
        os.close(self._fd)
