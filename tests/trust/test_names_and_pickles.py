"""Names that become paths are plain, and a study's storage runs no code."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import cmaes
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem

from lightning_moe.checkpoints import sharded
from lightning_moe.errors import UserError
from lightning_moe.internals.optuna import refuse_code_in_cmaes_states
from lightning_moe.sweep.space import read_space
from lightning_moe.trust import check_name, is_file_name, stays_inside

BAD = ["../../../../ESCAPED", "/etc/passwd", "a/b", "..", "", ".hidden", "a\0b", "line\nbreak", "é" * 3, "x" * 201]


@pytest.mark.parametrize("name", BAD)
def test_a_choice_or_key_that_is_a_path_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="must be a plain folder name"):
        check_name(name, "key")
    with pytest.raises(UserError, match=r"sweep\.yaml: space: rule: choices=.*plain folder name"):
        read_space({"rule": {"choices": {name: {}, "b": {}}}}, Path("sweep.yaml"))


def test_a_value_of_a_foreign_storage_is_no_choice() -> None:
    space = read_space({"rule": {"choices": {"a": {}, "b": {}}}}, Path("sweep.yaml"))
    with pytest.raises(UserError, match="the storage has a value of no choice"):
        space.layers({"rule": "../../../../ESCAPED"})


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "", ".", "..", "a\0", 3, None])
def test_a_file_that_names_no_file_of_its_folder(name: Any) -> None:
    assert not is_file_name(name)
    assert is_file_name("train-00000.tokens")


def test_links_and_dots_do_not_stay_inside(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path)
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "in").symlink_to(folder / "file")
    assert [stays_inside(folder, name) for name in ("file", "in", "..", "out", "/etc/passwd", "a\0")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip


def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    from lightning_moe.data.token_store import TokenStore

    (tmp_path / "store").mkdir()
    manifest = {
        "format": 2, "corpus": {}, "tokenizer": {"vocab_size": 9, "fingerprint": "x"}, "validation_fraction": 0.1,
        "dtype": "<u2", "splits": {}, "software": {}, "files": {"../secret": {"size": 1, "sha256": "", "crc32": ""}},
    }  # fmt: skip
    (tmp_path / "store/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"names '\.\./secret', which is no file of this folder"):
        TokenStore(tmp_path / "store")


def test_checksums_that_name_a_file_elsewhere_are_refused(tmp_path: Path) -> None:
    from lightning_moe.checkpoints.integrity import damage

    (tmp_path / "secret").write_text("1")
    folder = tmp_path / "last.ckpt"
    folder.mkdir()
    for name in (".metadata", "meta.pt"):
        (folder / name).touch()
    expected = {"size": 1, "sha256": "", "crc32": ""}
    (folder / "checksums.json").write_text(json.dumps({"../secret": expected}))
    assert "names '../secret', which is no file of this folder" in str(damage(folder))


def test_an_index_that_names_a_shard_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "last.ckpt"
    dcp.save({"weight": torch.ones(2)}, checkpoint_id=folder, no_dist=True)
    index = sharded.read_index(folder)
    assert sharded._damaged_shard(folder, index) is None
    for place in index.storage_data.values():
        (folder / place.relative_path).rename(tmp_path / "secret")
        place.relative_path = "../secret"
    assert "names '../secret', which is no file" in str(sharded._damaged_shard(folder, index))


class Maker:
    def __reduce__(self) -> tuple[Any, ...]:
        return filesystem.FileSystemWriter, ("made",)


def test_an_index_makes_no_objects_but_its_own() -> None:
    """torch's module of the index also has writers, and functions that write."""
    for planted in (Maker(), filesystem._generate_uuid, filesystem._write_files_from_queue):
        with pytest.raises(pickle.UnpicklingError, match="which is no part of an index"):
            sharded._IndexUnpickler(io.BytesIO(pickle.dumps(planted))).load()


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harmed"),)


def cmaes_pickle() -> Any:
    refuse_code_in_cmaes_states()
    from optuna.samplers import _cmaes

    return _cmaes.pickle


def test_code_in_the_state_of_the_cmaes_sampler_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match=r"refers to pathlib\S*, which is no part of a sampler's state"):
        cmaes_pickle().loads(pickle.dumps(Harmful()))
    assert not Path("harmed").exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_the_states_of_its_optimizers_are_read(protocol: int) -> None:
    for kind in (cmaes.CMA, cmaes.SepCMA):
        optimizer = kind(mean=np.zeros(3), sigma=1.0, seed=3)
        optimizer.tell([(optimizer.ask(), float(i)) for i in range(optimizer.population_size)])
        copy = cmaes_pickle().loads(pickle.dumps(optimizer, protocol))
        arrays = {name: value for name, value in vars(optimizer).items() if isinstance(value, np.ndarray)}
        assert arrays
        same = (np.array_equal(getattr(copy, name), value, equal_nan=True) for name, value in arrays.items())
        assert all(same)  # some of the memory is not initialised, and may hold NaN
