"""What ``export`` wrote is a checkpoint to every command; and what ``fit`` refuses to start from leaves no trace."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_run import Command
from torch import Tensor

from lightning_moe.checkpoints.read import read_checkpoint
from lightning_moe.errors import UserError
from lightning_moe.module import LanguageModel

CKPT = "runs/a/checkpoints/last.ckpt"
TIED = ("--config=small", "--model.decoder.tie_embeddings=true")


def ok(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert code == 0, err
    return out


@pytest.fixture
def exported(command: Command, workplace: Path) -> Command:
    """``model`` and ``model.safetensors`` of a trained run; text in ``text.txt``."""
    ok(command("fit", *TIED, "--run_name=a"))
    ok(command("export", "--ckpt_path", CKPT, "--output=model"))
    ok(command("convert", "--ckpt_path", CKPT, "--output=model.safetensors"))
    (workplace / "text.txt").write_text("line 1 of file 2 says 3 in words\n" * 60)
    return command


def weights(path: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("source", ["model", "model.safetensors"])
def test_back_to_one_file_bit_for_bit(exported: Command, source: str) -> None:
    out = ok(exported("convert", f"--ckpt_path={source}", "--output=back.ckpt"))
    assert "weights and routing state, of step 4" in out
    ours, theirs = (torch.load(path, weights_only=True) for path in (CKPT, "back.ckpt"))
    assert same(ours["state_dict"], {name: theirs["state_dict"][name] for name in ours["state_dict"]})
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    assert json.loads(json.dumps(ours["hyper_parameters"])) == theirs["hyper_parameters"]
    assert theirs["TextDataModule"]["data"] == ours["TextDataModule"]["data"]


def test_every_command_takes_the_folder_and_its_tokenizer(exported: Command) -> None:
    def generated(path: str) -> str:
        return ok(exported("generate", "--ckpt_path", path, "--prompt=line 1", "--max_new_tokens=8"))

    assert generated("model") == generated(CKPT)
    validated = [ok(exported("validate", "--ckpt_path", path, *TIED)) for path in ("model", CKPT)]
    folders = [re.findall(r"^Record: (.+)$", out, re.MULTILINE) for out in validated]
    assert all(Path(folder, "metrics.jsonl").is_file() for (folder,) in folders)
    ours, theirs = (out.replace(folder, "") for out, (folder,) in zip(validated, folders, strict=True))
    assert ours == theirs
    assert "causal" in ok(exported("audit", "--ckpt_path=model", "--text=text.txt", "--batch_size=2"))
    ok(exported("analyze", "--ckpt_path=model", "--text=mine=text.txt", "--max_tokens=60", "--no_mlflow"))
    ok(exported("calibrate", "--ckpt_path=model", "--text=text.txt", "--output_dir=calibrated", "--max_tokens=300"))
    assert sorted(path.name for path in Path("calibrated").iterdir()) == ["calibration.json", "checkpoints"]
    ok(exported("export", "--ckpt_path=model", "--output=again"))
    assert same(read_checkpoint(Path("model"))["state_dict"], read_checkpoint(Path("again"))["state_dict"])


@pytest.mark.parametrize("source", [CKPT, "model", "model.safetensors"])
def test_fit_starts_from_it(exported: Command, source: str) -> None:
    still = ("--model.optimizer.muon_lr=0", "--model.optimizer.adamw_lr=0", "--model.optimizer.embedding_lr=0")
    flags = ("--run_name=b", "--trainer.max_steps=1")
    ok(exported("fit", *TIED, *flags, f"--model.init_from={source}", *still, "--model.optimizer.head_lr=0"))
    ours, theirs = weights(CKPT), weights("runs/b/checkpoints/last.ckpt")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if ".state." not in name)


def damaged(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


REFUSED: list[tuple[tuple[str, ...], str]] = [
    (("fit", *TIED, "--ckpt_path=model"), "ckpt_path: model: has no optimizer state.*--model.init_from=model"),
    (("fit", "--config=small", "--model.init_from=gone"), "model.init_from: gone: no such file"),
    (("fit", "--config=small", "--model.init_from=model"), "init_from: model: The .*tie_embeddings: checkpoint True"),
    (("fit", "--config=small", "--model.init_from=half"), "model.init_from: half: not a whole export"),
    (("validate", "--config=small", "--ckpt_path=half"), "ckpt_path='half': not a complete checkpoint: it is damaged"),
    (("generate", "--ckpt_path=half"), "half: not a whole export of lightning_moe"),
    (("generate", "--ckpt_path=another.safetensors"), "another.safetensors: not a whole export of lightning_moe"),
    (("generate", "--ckpt_path=run"), "run: is the folder of a run; give a checkpoint of it, as run/checkpoints/last"),
    (("audit", "--ckpt_path=model"), "tokenizer model/tokenizer.json: it encodes --text; give that too"),
    (("analyze", "--ckpt_path=model"), "tokenizer model/tokenizer.json: it encodes --text"),
    (("calibrate", "--ckpt_path=model", "--output_dir=new"), "tokenizer model/tokenizer.json: it encodes --text"),
    (("convert", "--ckpt_path=model", "--output=model.safetensors"), "exists; --overwrite replaces it"),
    (("fit", *TIED, "--trainer.max_steps=3", "--model.schedule.adamw_warmup_steps=4"), "but the run has 3 optimizer"),
    (("convert", "--ckpt_path=gone", "--output=new.ckpt"), "gone: no such checkpoint"),
]  # fmt: skip


def test_what_cannot_be_used_is_one_line_and_leaves_nothing(exported: Command, workplace: Path) -> None:
    shutil.copytree("model", "half")
    damaged(workplace / "half", "model.safetensors")
    Path("another.safetensors").write_bytes(b"something else")
    shutil.rmtree("runs/a")
    Path("run/checkpoints").mkdir(parents=True)
    before = sorted(str(path) for path in workplace.rglob("*"))

    for args, message in REFUSED:
        code, out, err = exported(*args)
        assert (code, out) == (2, ""), (args, err)
        assert re.search(message, err, re.DOTALL), (args, err)
        assert "Traceback" not in err
        assert sorted(str(path) for path in workplace.rglob("*")) == before, args


@pytest.mark.parametrize("source", [CKPT, "model", "model.safetensors"])
def test_weights_of_another_tokenizer_are_refused(exported: Command, workplace: Path, source: str) -> None:
    own = json.loads(Path("model/tokenizer.json").read_text())
    own["model"]["merges"][-2:] = own["model"]["merges"][:-3:-1]  # the last two learned, the other way round
    Path("other.json").write_text(json.dumps(own))
    for tokenizer, refused in (("other.json", True), ("model/tokenizer.json", False)):
        start = (f"--model.init_from={source}", f"--data.tokenizer.file={tokenizer}", "--trainer.max_steps=1")
        code, _, err = exported("fit", *TIED, "--run_name=b", *start)
        assert code == (2 if refused else 0), err
        assert refused == (f"model.init_from: {source}: the tokenizer " in err), err
        assert Path("runs/b").exists() != refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}, "global_step": 1, "pytorch-lightning_version": "2.0"}, "not a checkpoint of this program"),
        (torch.zeros(2), "not a checkpoint of this program"),
        (None, "no such file"),
    ],
)
def test_lightnings_way_to_load_refuses_with_a_reason(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "theirs.ckpt"
    if content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=f"theirs.ckpt: {message}"):
        LanguageModel.load_from_checkpoint(path)


def test_lightnings_way_to_load_is_the_model(exported: Command) -> None:
    model = LanguageModel.load_from_checkpoint(CKPT)
    assert not model.training
    assert same(weights(CKPT), model.state_dict())
