"""What we use of Optuna that is not in its documentation."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial


def reopen_trial(optuna_study: Study, frozen: FrozenTrial) -> Trial:
    """Continue a RUNNING trial that another process began; stands in for ``Study.ask`` with a number, which is missing.

    What the trial has already (parameters, reported values) is kept.
    """
    from optuna.trial import Trial

    return Trial(optuna_study, frozen._trial_id)


def ignore_stop(optuna_study: Study) -> None:
    """Let samplers call ``Study.stop`` when nothing is left to try; outside of ``Study.optimize`` it is an error."""
    optuna_study.stop = lambda: None  # type: ignore[method-assign]


class JournalKernelLock:
    """A lock for ``JournalFileBackend(lock_obj=…)`` that the kernel frees when its holder is killed.

    It stands in for Optuna's own locks, which then stay for half a minute. Their base class is not public, so this
    class has the same two methods without inheriting from it.

    Args:
        path: file to lock; made where it is missing.
    """

    def __init__(self, path: str) -> None:
        self._path, self._fd = path, -1

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        """Free the lock."""
        os.close(self._fd)
