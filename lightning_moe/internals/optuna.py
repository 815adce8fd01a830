"""Parts of Optuna that are not in its documentation."""

from __future__ import annotations

import io
import os
import pickle
from typing import TYPE_CHECKING, Any

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


def refuse_code_in_cmaes_states() -> None:
    """Let `CmaEsSampler` read its state, which it keeps as a pickle in the storage, without running code in it.

    The storage may be somebody else's. Found in Optuna 5.0: ``optuna.samplers._cmaes`` calls ``pickle.loads``.
    """
    from optuna.samplers import _cmaes

    _cmaes.pickle = _CmaesPickle  # type: ignore[assignment,attr-defined]


class _CmaesPickle:
    """The two functions of ``pickle`` that the sampler uses."""

    dumps = staticmethod(pickle.dumps)

    @staticmethod
    def loads(data: bytes) -> Any:
        return _CmaesUnpickler(io.BytesIO(data)).load()


class _CmaesUnpickler(pickle.Unpickler):
    """An unpickler that takes the optimizers of ``cmaes``, NumPy's arrays and its generators only."""

    def find_class(self, module: str, name: str) -> Any:
        found = None
        if module.startswith("cmaes.") and "." not in name:
            found = super().find_class(module, name)
            found = found if isinstance(found, type) and found.__module__ == module else None
        elif (module, name) in _NUMPY:
            found = super().find_class(module, name)
        if found is None:
            raise pickle.UnpicklingError(f"refers to {module}.{name}, which is no part of a sampler's state")
        return found


_NUMPY = {
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.random._pickle", "__randomstate_ctor"),
    ("numpy.random._pickle", "__bit_generator_ctor"),
    ("numpy.random._mt19937", "MT19937"),
    ("_codecs", "encode"),
}


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
