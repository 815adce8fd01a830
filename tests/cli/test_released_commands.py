"""calibrate --model and dial on the command line: what they write, what they refuse, and what they never touch."""

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.hf_models import DENSE, make_folder
from helpers.small_run import Command
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "".join(f"line {number} of the text says {number * 37 % 101} in words\n" for number in range(700))
FLAGS = ("--text=text.txt", "--max_tokens=2000", "--sequence_length=32")


@pytest.fixture(autouse=True)
def _text(workplace: Path) -> None:
    (workplace / "text.txt").write_text(TEXT)


@pytest.fixture
def model(workplace: Path) -> Iterator[str]:
    """A folder of which every byte and every name is afterwards as before."""
    make_folder("qwen3_moe", workplace / "qwen", sharded=True)
    before = digests(workplace / "qwen")
    yield "qwen"
    assert digests(workplace / "qwen") == before


def digests(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_thresholds_of_a_model_are_used_by_other_commands(command: Command, model: str) -> None:
    code, out, err = command(
        "calibrate", f"--model={model}", "--output_dir=half", "--num_experts_per_token=1.5", "--balanced", *FLAGS
    )
    assert code == 0, err
    assert "ReleasedTopK with 2 experts per token -> thresholds for a mean of 1.5 of 8, with equal loads" in out
    assert "calibrated on 2,016 tokens of text.txt" in out
    assert sorted(path.name for path in Path("half").iterdir()) == [
        "calibration.json", "routing.json", "routing.safetensors"
    ]  # fmt: skip
    report = json.loads(Path("half/calibration.json").read_text())
    [before, after] = (report[when]["other windows of it"]["usage"] for when in ("before", "after"))
    assert sum(before[0]) / 8 == pytest.approx(1)  # of 2
    assert sum(after[0]) / 8 == pytest.approx(1, abs=0.1)  # of 1.5
    assert max(after[0]) < max(before[0])
    code, _, err = command("generate", "--model=half", "--prompt=line 1", "--max_new_tokens=4")
    assert code == 0, err
    code, out, err = command("audit", "--model=half", "--text=text.txt", "--batch_size=2", "--sequence_length=16")
    assert code == 0, err
    assert "ExpertThreshold" in out

    code, out, err = command("calibrate", "--model=half", "--output_dir=again", "--balanced", *FLAGS)  # keeps the 1.5
    assert code == 0, err
    assert "ExpertThreshold with 1.5 experts per token -> thresholds for a mean of 1.5 of 8, with equal loads" in out
    one, other = (load_file(f"{name}/routing.safetensors") for name in ("half", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_each_layer_may_have_a_number_of_its_own(command: Command, model: str) -> None:
    code, _, err = command(
        "calibrate", f"--model={model}", "--output_dir=x", "--num_experts_per_token", "1", "3", *FLAGS
    )
    assert code == 0, err
    assert json.loads(Path("x/routing.json").read_text())["num_experts_per_token"] == {"0": 1.0, "2": 3.0}


def test_a_whole_folder_loads_bit_for_bit_with_plain_transformers(command: Command, model: str) -> None:
    code, _, err = command("calibrate", f"--model={model}", "--output_dir=whole", "--with_model", *FLAGS)
    assert code == 0, err
    for path in Path(model).iterdir():
        assert (Path("whole") / path.name).read_bytes() == path.read_bytes()
        assert not (Path("whole") / path.name).is_symlink()
    first, copy = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, "whole"))
    state, again = first.state_dict(), copy.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert first.config.to_diff_dict() == copy.config.to_diff_dict()
    assert (
        AutoTokenizer.from_pretrained("whole")(TEXT).input_ids == AutoTokenizer.from_pretrained(model)(TEXT).input_ids
    )
    Path(model).rename("moved")  # the copy stands by itself
    code, _, err = command("generate", "--model=whole", "--prompt=line", "--max_new_tokens=2")
    Path("moved").rename(model)
    assert code == 0, err


def test_dial_writes_a_page_of_all_methods(command: Command, model: str) -> None:
    code, _, err = command(
        "dial", f"--model={model}", "--output_dir=dial", "--num_experts_per_token", "1", "1.5", *FLAGS
    )
    assert code == 0, err
    with Path("dial/dial.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [(row["method"], float(row["asked_num_experts_per_token"])) for row in rows]
    methods = ["top-k", "top-p", "min-p", "thresholds", "balanced thresholds"]
    every = [(method, 1.0) for method in methods] + [(method, 1.5) for method in methods[1:]]
    assert found == every + [(method, 2.0) for method in methods]  # that of the model itself, too
    assert [row["method"] for row in rows if row["released"] == "True"] == ["top-k"]
    page = Path("dial/dial.md").read_text()
    assert "top-k (as released)" in page
    assert page.count("| thresholds ") == page.count("| balanced thresholds ") == 3
    assert Image.open("dial/dial.png").size[0] > 800


def test_bad_input_is_refused_and_nothing_written(command: Command, model: str, workplace: Path) -> None:
    make_folder(DENSE, workplace / "dense")
    make_folder("qwen3_moe", workplace / "holes", sharded=True)
    next((workplace / "holes").glob("*00002-of*")).unlink()
    make_folder("qwen3_moe", workplace / "packed")
    config = json.loads((workplace / "packed/config.json").read_text())
    packed = {**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (workplace / "packed/config.json").write_text(json.dumps(packed))
    make_folder("qwen3_moe", workplace / "mute", tokenizer=None)
    (workplace / "taken").mkdir()
    (workplace / "short.txt").write_text("too short")
    (workplace / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (workplace / "other").mkdir()
    (workplace / "other/tokenizer.json").write_text(big_tokenizer(workplace / "qwen/tokenizer.json"))
    cases: list[tuple[tuple[str, ...], str]] = [
        (("--model=dense",), "Qwen3ForCausalLM is a dense model: it has no routers"),
        (("--model=holes",), "shards are missing, model-00002-of"),
        (("--model=packed",), "its weights are quantised (gptq)"),
        (("--model=mute",), "--model mute: no tokenizer can be read there"),
        (("--model=nowhere/at/all",), "--model nowhere/at/all: there is no such folder"),
        (
            ("--model=qwen", "--tokenizer=other/tokenizer.json"),
            "--tokenizer other/tokenizer.json: its tokenizer has ids",
        ),
        (("--model=qwen", "--text=short.txt"), "at least two windows of 33"),
        (("--model=qwen", "--text=gone.txt"), "--text gone.txt: no such file"),
        (("--model=qwen", "--text=latin.txt"), "--text latin.txt"),
        (("--model=qwen", "--output_dir=taken"), "--output_dir taken: exists"),
        (
            ("--model=qwen", "--output_dir=qwen/inside"),
            "is inside the model's folder, in which nothing is ever written",
        ),
        (("--model=qwen", "--num_experts_per_token=9"), "must be above 0 and at most num_experts=8"),
        (("--model=qwen", "--num_experts_per_token=0"), "0: must be above 0"),
        (("--model=qwen", "--num_experts_per_token=nan"), "nan: must be above 0"),
        (("--model=qwen", "--sequence_length=65"), "--sequence_length 65: the model's context is 64"),
        (("--model=qwen", "--device=nowhere"), "--device nowhere"),
    ]
    for arguments, message in cases:
        for name in ("calibrate", "dial"):
            code, out, err = command(name, "--output_dir=new", *FLAGS, *arguments)
            assert (code, out) == (2, ""), (name, arguments)
            assert message in err, (name, err)
            assert len(err.strip().splitlines()) == 1 or "usage:" in err, err
            assert not Path("new").exists()
    for arguments, message in [
        (("--num_experts_per_token", "1", "2", "3"), "give one number, or one for each of the 2 MoE layers"),
        (("--with_model", "--dtype=bfloat16"), "--with_model copies the weights as they are"),
    ]:
        code, _, err = command("calibrate", "--output_dir=new", f"--model={model}", *FLAGS, *arguments)
        assert code == 2
        assert message in err
    code, _, err = command("calibrate", "--output_dir=new", "--ckpt_path=gone.ckpt", "--with_model")
    assert code == 2
    assert "--with_model: belongs to --model" in err
    assert list((workplace / "taken").iterdir()) == []
    assert not Path("new").exists()


def big_tokenizer(file: Path) -> str:
    """A tokenizer with more tokens than the model knows."""
    content = json.loads(file.read_text())
    for number in range(len(content["model"]["vocab"]), 700):
        content["model"]["vocab"][f"never{number}"] = number
    return json.dumps(content)
