"""The Optuna study of a sweep: its storage, sampler and pruner, and the check that it is the right one."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_moe.config.compose import walk
from lightning_moe.errors import UserError, did_you_mean
from lightning_moe.internals.optuna import JournalKernelLock, refuse_code_in_cmaes_states
from lightning_moe.redaction import redact, redact_all
from lightning_moe.sweep.locks import CONNECTION, FileLocks, Locks, PostgresLocks
from lightning_moe.sweep.spec import Sweep
from lightning_moe.user_paths import user_url

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

SCHEMES = ("sqlite:///", "journal:///", "postgresql://")
IDENTITY = "identity"  # user attribute of the Optuna study that holds `Sweep.identity`
#: samplers with one sequence for the whole sweep, which the seed names; a seed for each trial would break it
SEQUENCES = ("QMCSampler",)


@dataclass(frozen=True)
class OpenOptunaStudy:
    """An Optuna study, and the locks by which its processes share it."""

    optuna_study: Study
    locks: Locks


def storage_errors() -> tuple[type[Exception], ...]:
    """Return the errors of an Optuna study or its locks when their storage does not answer."""
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
    """Return whether the storage may hold the sweep already, which only a missing file of its own cannot."""
    return sweep.storage is not None or _own_database(sweep).exists()


#: samplers whose library Optuna looks for only at the second trial
LIBRARIES = {"CmaEsSampler": "cmaes", "GPSampler": "scipy", "QMCSampler": "scipy"}


def _own_database(sweep: Sweep) -> Path:
    return sweep.folder / "study.db"


def open_optuna_study(sweep: Sweep) -> OpenOptunaStudy:
    """Open the Optuna study of a sweep, or make it; one without a trial is made anew if the sweep has changed since.

    Raises:
        UserError: the storage cannot be reached, Optuna has no such sampler or pruner, or the Optuna study of this name
            belongs to another sweep.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    methods = {"sampler": build_sampler(sweep, 0), "pruner": _build_pruner(sweep)}
    sweep.folder.mkdir(parents=True, exist_ok=True)
    url = user_url(sweep.storage or "", f"{sweep.path}: storage") or f"sqlite:///{_own_database(sweep)}"
    where = f"{sweep.path}: storage={redact(url)!r}"
    unreachable: tuple[type[Exception], ...] = (*storage_errors(), OSError)
    try:
        locks = _locks(url, sweep.name)
        with locks.mutex():
            found: dict[str, Any] = {"study_name": sweep.name, "storage": _storage(url)}
            directions: Any = list(sweep.objectives.values())
            exists = sweep.name in optuna.get_all_study_names(found["storage"])
            if exists and _is_stale(optuna.load_study(**found), sweep):
                optuna.delete_study(**found)
                exists = False
            if exists:
                optuna_study = optuna.load_study(**found, **methods)
            else:
                optuna_study = optuna.create_study(**found, **methods, directions=directions)
            _check_identity(optuna_study, sweep)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except unreachable as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()
        raise UserError(f"{where}: cannot be reached: {redact(reason[0]) if reason else error}") from error
    except RuntimeError as error:  # Optuna's word for tables that are not its own
        raise UserError(
            f"{where}: holds the tables of another program, such as MLflow, or of another version of Optuna: "
            "give the sweeps a database of their own"
        ) from error
    return OpenOptunaStudy(optuna_study, locks)


def _is_stale(optuna_study: Study, sweep: Sweep) -> bool:
    """Return whether the sweep has changed before its first trial, for example because the first check refused it."""
    saved = optuna_study.user_attrs.get(IDENTITY)
    return (
        saved is not None
        and redact_all(json.loads(saved)) != sweep.identity()
        and not optuna_study.get_trials(deepcopy=False)
    )


def _check_identity(optuna_study: Study, sweep: Sweep) -> None:
    """Write the sweep's identity into a new Optuna study, and compare it with that of an old one.

    Raises:
        UserError: naming what differs.
    """
    given = sweep.identity()
    if IDENTITY not in optuna_study.user_attrs:
        if optuna_study.get_trials(deepcopy=False):
            raise UserError(f"the Optuna study {sweep.name!r} there is not of this command: choose another name")
        optuna_study.set_user_attr(IDENTITY, json.dumps(given))
        return
    saved = redact_all(json.loads(optuna_study.user_attrs[IDENTITY]))
    for part, content in given.items():
        old, new = _leaves(saved.get(part, {})), _leaves(content)
        for key in {**old, **new}:
            there, here = old.get(key), new.get(key)
            if isinstance(there, dict) or isinstance(here, dict):  # a branch on one side; its leaves say more
                continue
            if old.get(key, "nothing") != new.get(key, "nothing"):
                raise UserError(
                    f"the Optuna study {sweep.name!r} there has another {part}: {key + ': ' if key else ''}"
                    f"{json.dumps(there)} there, {json.dumps(here)} here; its trials cannot be compared "
                    "with new ones: choose another name (--name)"
                )


def _leaves(content: Any) -> dict[str, Any]:
    return dict(walk(content)) if isinstance(content, dict) else {"": content}


def build_sampler(sweep: Sweep, number: int) -> BaseSampler:
    """Build the sampler for one trial.

    If it takes a seed and the file gives one, its seed depends on the trial's number too. So every trial draws new
    values, whichever process samples it, after any number of interruptions.

    Args:
        sweep: sweep of the trial.
        number: number of the trial.
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
    if name == "CmaEsSampler":
        refuse_code_in_cmaes_states()
    seed = arguments.get("seed")
    if isinstance(seed, int) and name not in SEQUENCES:
        arguments["seed"] = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    sampler: BaseSampler = _build(cls, arguments, key)
    return sampler


def _build_pruner(sweep: Sweep) -> Any:
    import optuna

    return optuna.pruners.NopPruner() if sweep.pruner is None else _pruner(sweep.pruner, f"{sweep.path}: pruner")


def _pruner(entry: Mapping[str, Any], key: str) -> Any:
    """Build a pruner, which may hold another one: ``wrapped_pruner: {name: …}``."""
    import optuna

    arguments = {
        name: _pruner(value, f"{key}.{name}") if isinstance(value, Mapping) and "name" in value else value
        for name, value in entry.items()
    }
    return _build(_find(optuna.pruners, arguments.pop("name"), "Pruner", key), arguments, key)


def _find(module: Any, name: str, suffix: str, key: str) -> Any:
    known = [n for n in module.__all__ if n.endswith(suffix) and not n.startswith("Base")]
    if name not in known:
        raise UserError(f"{key}: name={name!r}: {did_you_mean(name, known, 'Optuna has')}")
    return getattr(module, name)


def _build(cls: Any, arguments: Mapping[str, Any], key: str) -> Any:
    import warnings

    known = [name for name in inspect.signature(cls).parameters if name != "self"]
    for name in arguments:
        if name not in known:
            hint = did_you_mean(name, known, "it takes")
            raise UserError(f"{key}: {cls.__name__} has no argument {name!r}: {hint}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "experimental"
            if cls.__name__ in LIBRARIES:
                import_module(LIBRARIES[cls.__name__])
            return cls(**arguments)
    except ImportError as error:
        reason = f"pip install {error.name.partition('.')[0]}" if error.name else " ".join(str(error).split())
        raise UserError(f"{key}: {cls.__name__} needs another library: {reason}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{key}: {cls.__name__}: {' '.join(str(error).split())}") from error


def _locks(url: str, name: str) -> Locks:
    scheme = next((scheme for scheme in SCHEMES if url.startswith(scheme)), None)
    if scheme is None:
        raise UserError(f"must begin with one of {', '.join(SCHEMES)}")
    if scheme == "postgresql://":
        try:
            import psycopg  # noqa: F401
        except ImportError:
            raise UserError("needs the PostgreSQL driver: pip install -e '.[postgres]' in a checkout") from None
        return PostgresLocks(url, name)
    path = Path(url.removeprefix(scheme))
    return FileLocks(path.with_name(f"{path.name}.{name}.locks"))


def _storage(url: str) -> BaseStorage:
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if url.startswith("journal:///"):
        path = url.removeprefix("journal:///")
        lock: Any = JournalKernelLock(f"{path}.lock")
        return JournalStorage(JournalFileBackend(path, lock_obj=lock))
    if url.startswith("postgresql://"):
        return RDBStorage(
            url.replace("postgresql://", "postgresql+psycopg://", 1),
            engine_kwargs={"pool_pre_ping": True, "connect_args": CONNECTION},
        )
    return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
