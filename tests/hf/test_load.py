"""What is no whole, known model in a folder is refused in one line; the folder stays as it is."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from lightning_moe.errors import UserError
from lightning_moe.hf import TransformersLM, load_model
from tests.helpers.hf_models import make_folder, make_model
from tests.hf.test_structure import ids


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    make_folder("qwen3_moe", folder, sharded=True)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "small"))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_folder_of_shards_is_the_model_that_was_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    make_folder("deepseek_v3", tmp_path / "small", sharded=True, dtype=dtype)
    before = digests(tmp_path / "small")
    found = load_model(str(tmp_path / "small"))
    expected = TransformersLM(make_model("deepseek_v3", dtype=dtype))
    with torch.no_grad():
        assert torch.equal(found(ids()).logits, expected(ids()).logits)
    assert found.model.dtype is dtype
    assert load_model(str(tmp_path / "small"), torch.bfloat16).model.dtype is torch.bfloat16
    assert digests(tmp_path / "small") == before


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda f: shutil.rmtree(f), r"small: there is no such folder"),
    "no config": (lambda f: (f / "config.json").unlink(), r"small: has no config\.json"),
    "config that is no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json"),
    "unknown type": (lambda f: edit(f / "config.json", model_type="qwen99"), r"--model .*small: .*qwen99"),
    "an export of ours": (
        lambda f: edit(f / "config.json", lightning_moe={}),
        r"is an export of this package; give it",
    ),
    "quantised": (
        lambda f: edit(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        r"its weights are quantised \(gptq\)",
    ),
    "a missing shard": (lambda f: first_shard(f).unlink(), r"1 of \d+ shards are missing, model-00001-of-\d+"),
    "a shard cut off": (
        lambda f: truncate(first_shard(f)),
        r"model-00001.* is no whole safetensors file: it has [\d,]+",
    ),
    "a shard of text": (lambda f: first_shard(f).write_text("x" * 99), r"model-00001.* is no whole safetensors file"),
    "an index of nothing": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        r"index\.json: weight_map: must name files of this folder",
    ),
    "an index to elsewhere": (
        lambda f: edit(f / "model.safetensors.index.json", weight_map={"x": "../x.safetensors"}),
        r"index\.json: weight_map: must name files of this folder",
    ),
    "a weight that no shard has": (
        lambda f: edit(
            f / "model.safetensors.index.json",
            weight_map={
                name: file
                for name, file in json.loads((f / "model.safetensors.index.json").read_text())["weight_map"].items()
                if "lm_head" not in name and "experts" not in name
            },
        ),
        r"\d+ weights are missing or of another shape",
    ),
    "experts of another size": (
        lambda f: edit(f / "config.json", moe_intermediate_size=12),
        r"small: \d+ weights are missing or of another shape than its config\.json says, .*experts.* among them",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_refused_in_one_line(case: str, folder: Path) -> None:
    change, message = BAD[case]
    change(folder)
    before = digests(folder) if folder.exists() else {}
    with pytest.raises(UserError, match=message) as raised:
        load_model(str(folder))
    assert "\n" not in str(raised.value)
    assert (digests(folder) if folder.exists() else {}) == before


def test_pickles_are_never_read(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"\(pytorch_model\.bin is a pickle, which is never read\)"):
        load_model(str(folder))


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: is a file; give the folder"):
        load_model(str(folder / "config.json"))


def test_a_model_too_large_for_the_memory_is_refused_with_the_arithmetic(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=200_000))
    with pytest.raises(
        UserError, match=r"[\d,]+ parameters take 0\.0 GiB, and the passes a fifth of that again, but this"
    ):
        load_model(str(folder))


def test_a_device_that_is_not_there(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=r"--device cuda:0: "):
        load_model(str(folder), device="cuda:0")
