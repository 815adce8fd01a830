"""The Optuna study: where it is kept, by which sampler and pruner, and whether it is the one that is meant."""

from __future__ import annotations

import fcntl
import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_moe.config.compose import walk
from lightning_moe.errors import UserError
from lightning_moe.sweep.claims import CONNECTION, Claims, FileClaims, PostgresClaims
from lightning_moe.sweep.spec import Sweep
from lightning_moe.tracking.store import redact

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

SCHEMES = ("sqlite:///", "journal:///", "postgresql://")
IDENTITY = "identity"  # the study's user attribute that holds `Sweep.identity`
#: one sequence for the whole study, which a seed names; another seed for each trial would tear it
SEQUENCES = ("QMCSampler",)


@dataclass
class OpenStudy:
    """A study, and the locks by which its processes share it.

    Args:
        study: the study.
        claims: its locks.
        is_new: whether it was made just now.
    """

    study: Study
    claims: Claims
    is_new: bool


def storage_errors() -> tuple[type[Exception], ...]:
    """What a study or its locks raise when their storage does not answer."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    return (SQLAlchemyError, StorageInternalError, ConnectionError)


def check_methods(sweep: Sweep) -> None:
    """Refuse a sampler or pruner that Optuna does not have, or arguments that it does not take.

    Raises:
        UserError: naming the key.
    """
    build_sampler(sweep, 0)
    _build_pruner(sweep)


def has_storage(sweep: Sweep) -> bool:
    """Whether the sweep's storage may hold its study already; false for a database of its own that is not there yet."""
    return sweep.storage is not None or _own_database(sweep).exists()


def _own_database(sweep: Sweep) -> Path:
    return sweep.folder / "study.db"


def open_study(sweep: Sweep) -> OpenStudy:
    """Open the study of a sweep, or make it; one without a trial is made anew where the sweep has changed since.

    Raises:
        UserError: the storage cannot be reached, a sampler or pruner that Optuna does not have, or the study of this
            name is of another sweep.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler, pruner = build_sampler(sweep, 0), _build_pruner(sweep)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    url = sweep.storage or f"sqlite:///{_own_database(sweep)}"
    where = f"{sweep.path}: storage={redact(url)!r}"
    unreachable: tuple[type[Exception], ...] = (*storage_errors(), OSError)
    try:
        claims = _claims(url, sweep.name)
        with claims.turn():
            storage = _storage(url)
            names = {
                summary.study_name for summary in optuna.get_all_study_summaries(storage, include_best_trial=False)
            }
            is_new = sweep.name not in names
            if not is_new and _is_stale(optuna.load_study(study_name=sweep.name, storage=storage), sweep):
                optuna.delete_study(study_name=sweep.name, storage=storage)
                is_new = True
            study = (
                optuna.create_study(
                    storage=storage,
                    sampler=sampler,
                    pruner=pruner,
                    study_name=sweep.name,
                    directions=list(sweep.objectives.values()),  # type: ignore[arg-type]
                    load_if_exists=True,
                )
                if is_new
                else optuna.load_study(study_name=sweep.name, storage=storage, sampler=sampler, pruner=pruner)
            )
            if IDENTITY not in study.user_attrs:
                if study.get_trials(deepcopy=False):
                    raise UserError(f"the study {sweep.name!r} there was not made by this command: choose another name")
                study.set_user_attr(IDENTITY, json.dumps(sweep.identity()))
            _check_identity(json.loads(study.user_attrs[IDENTITY]), sweep)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except unreachable as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()
        raise UserError(f"{where}: cannot be reached: {redact(reason[0]) if reason else error}") from error
    except RuntimeError as error:  # Optuna's word for tables that are not its own
        raise UserError(
            f"{where}: holds the tables of another program, such as MLflow, or of another version of Optuna: "
            "give the studies a database of their own"
        ) from error
    return OpenStudy(study, claims, is_new)


def _is_stale(study: Study, sweep: Sweep) -> bool:
    """Whether nothing was tried yet of what was meant then, as when the first check refused it."""
    meant = study.user_attrs.get(IDENTITY)
    given = json.loads(json.dumps(sweep.identity()))
    return meant is not None and json.loads(meant) != given and not study.get_trials(deepcopy=False)


def _check_identity(saved: Mapping[str, Any], sweep: Sweep) -> None:
    given = json.loads(json.dumps(sweep.identity()))
    for part, content in given.items():
        old, new = (
            dict(walk(saved.get(part, {}))) if isinstance(content, dict) else {"": saved.get(part)},
            (dict(walk(content)) if isinstance(content, dict) else {"": content}),
        )
        leaves = [
            key for key in {**old, **new} if not isinstance(old.get(key), dict) and not isinstance(new.get(key), dict)
        ]
        for key in leaves:
            if old.get(key, "nothing") != new.get(key, "nothing"):
                raise UserError(
                    f"the study {sweep.name!r} there has another {part}: {key + ': ' if key else ''}"
                    f"{json.dumps(old.get(key))} there, {json.dumps(new.get(key))} here; its trials cannot be compared "
                    "with new ones: choose another name (--name)"
                )


def build_sampler(sweep: Sweep, number: int) -> BaseSampler:
    """The sampler for one trial.

    Where it takes a seed and the file gives one, the trial's number is mixed in: so every trial draws anew, whichever
    process samples it and after however many interruptions.

    Args:
        sweep: the sweep.
        number: the trial's.
    """
    import numpy as np
    import optuna

    arguments = dict(sweep.sampler)
    name = arguments.pop("name")
    key = f"{sweep.path}: sampler"
    if name == "GridSampler":
        raise UserError(f"{key}: name={name!r}: take BruteForceSampler, which also knows conditions")
    cls = _find(optuna.samplers, name, "Sampler", key)
    if name == "BruteForceSampler" and sweep.space.size() is None:
        raise UserError(f"{key}: name={name!r}: needs choices, int, or float with step everywhere in the space")
    seed = arguments.get("seed")
    if isinstance(seed, int) and name not in SEQUENCES:
        arguments["seed"] = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    sampler: BaseSampler = _build(cls, arguments, key)
    return sampler


def _build_pruner(sweep: Sweep) -> Any:
    import optuna

    return optuna.pruners.NopPruner() if sweep.pruner is None else _pruner(sweep.pruner, f"{sweep.path}: pruner")


def _pruner(entry: Mapping[str, Any], key: str) -> Any:
    """A pruner may hold another one, ``wrapped_pruner: {name: …}``."""
    import optuna

    arguments = {
        name: _pruner(value, f"{key}.{name}") if isinstance(value, Mapping) and "name" in value else value
        for name, value in entry.items()
    }
    return _build(_find(optuna.pruners, arguments.pop("name"), "Pruner", key), arguments, key)


def _find(module: Any, name: str, suffix: str, key: str) -> Any:
    known = [n for n in module.__all__ if n.endswith(suffix) and not n.startswith("Base")]
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"Optuna has {', '.join(known)}"
        raise UserError(f"{key}: name={name!r}: {hint}")
    return getattr(module, name)


def _build(cls: Any, arguments: Mapping[str, Any], key: str) -> Any:
    import warnings

    known = [name for name in inspect.signature(cls).parameters if name != "self"]
    for name in arguments:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
            raise UserError(f"{key}: {cls.__name__} has no argument {name!r}: {hint}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "experimental"
            return cls(**arguments)
    except (TypeError, ValueError, AttributeError, ImportError) as error:
        raise UserError(f"{key}: {cls.__name__}: {' '.join(str(error).split())}") from error


def _claims(url: str, name: str) -> Claims:
    scheme = next((scheme for scheme in SCHEMES if url.startswith(scheme)), None)
    if scheme is None:
        raise UserError(f"must begin with one of {', '.join(SCHEMES)}")
    if scheme == "postgresql://":
        try:
            import psycopg  # noqa: F401
        except ImportError:
            raise UserError("needs the PostgreSQL driver: pip install -e '.[postgres]' in a checkout") from None
        return PostgresClaims(url, name)
    path = Path(url.removeprefix(scheme))
    return FileClaims(path.with_name(f"{path.name}.{name}.locks"))


def _storage(url: str) -> BaseStorage:
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.storages.journal._file import BaseJournalFileLock

    class KernelLock(BaseJournalFileLock):
        """Freed by the kernel when its holder is killed; Optuna's own then stays for half a minute."""

        def __init__(self, path: str) -> None:
            self._path, self._fd = path, -1

        def acquire(self) -> bool:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            return True

        def release(self) -> None:
            os.close(self._fd)

    if url.startswith("journal:///"):
        path = url.removeprefix("journal:///")
        return JournalStorage(JournalFileBackend(path, lock_obj=KernelLock(f"{path}.lock")))
    if url.startswith("postgresql://"):
        return RDBStorage(
            url.replace("postgresql://", "postgresql+psycopg://", 1),
            engine_kwargs={"pool_pre_ping": True, "connect_args": CONNECTION},
        )
    return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
