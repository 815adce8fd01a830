"""Released models on the command line: every command that takes --model, on real folders."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from helpers.hf_models import EXPERTS, make_folder
from helpers.hf_tokenizers import TokenizerKind
from helpers.small_run import Command

FAMILIES: dict[str, TokenizerKind] = {"mixtral": "metaspace", "deepseek_v3": "nfc"}
TEXT = "Each expert keeps a threshold, and a token goes where its score exceeds it.\n" * 60


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, workplace: Path) -> Path:
    make_folder(request.param, workplace / "small", tokenizer=FAMILIES[request.param])
    (workplace / "text.txt").write_text(TEXT)
    return workplace / "small"


def digest(folder: Path) -> str:
    content = b"".join(path.name.encode() + path.read_bytes() for path in sorted(folder.iterdir()))
    return hashlib.sha256(content).hexdigest()


def test_all_commands_run_a_released_model_and_leave_its_folder_alone(command: Command, model: Path) -> None:
    before = digest(model)
    code, out, err = command("generate", "--model", str(model), "--prompt", "Each", "--max_new_tokens", "4")
    assert code == 0, err
    assert out.lstrip().startswith("Each")  # some tokenizers put a space before a text
    assert "4 new tokens" in err

    arguments = ("--model", "small", "--text", "text.txt", "--sequence_length", "32", "--batch_size", "4")
    code, out, err = command("audit", *arguments)
    assert code == 0, err
    assert "ReleasedTopK, phase causal, 4 sequences of 32 tokens" in out
    assert "\nverdict: causal." in out

    code, out, err = command("validate", *arguments)
    assert code == 0, err
    scores = out.splitlines()
    assert scores[1].split()[0] == "text"
    loss = float(scores[1].split()[2])
    code, halved, err = command("validate", *arguments, "--inference_num_experts_per_token", "1")
    assert code == 0, err
    assert float(halved.splitlines()[1].split()[2]) != loss
    assert [line.split()[1] for line in halved.splitlines()[4:6]] == ["1.000", "1.000"]

    code, out, err = command("analyze", *arguments, "--output_dir", "report", "--compare_num_experts_per_token", "1")
    assert code == 0, err
    results = json.loads(Path("report/analysis.json").read_text())
    [facts] = next(rows for name, rows in results["facts"].items() if name.startswith("Checkpoints"))
    assert facts["routing"] == "released top-k"
    assert facts["step"] is None
    assert facts["loss / nats per token"] == pytest.approx(loss, abs=1e-4)
    assert facts["fanout, all layers"] == pytest.approx(4)
    assert facts["parameters"] > facts["active"] > 0
    assert "train-eval" not in Path("report/report.html").read_text()
    assert digest(model) == before


def test_a_generation_in_bf16_is_replayed_in_fp32(command: Command, workplace: Path) -> None:
    make_folder("qwen3_moe", workplace / "small", dtype=torch.bfloat16)
    make_folder("qwen3_moe", workplace / "other", dtype=torch.bfloat16, seed=1)
    arguments = ("--model", "small", "--prompt", "Each", "--prompt", "a token", "--max_new_tokens", "30", "--seed", "1")
    code, _, err = command("generate", *arguments, "--save_routes", "routes.safetensors")
    assert code == 0, err
    code, out, err = command("replay", "--model", "small", "--dtype", "float32", "--routes", "routes.safetensors")
    assert code == 0, err
    assert "bf16" in out
    code, _, err = command("replay", "--model", "other", "--routes", "routes.safetensors")
    assert code == 2
    assert "was generated with other weights" in err


def test_bad_input_is_one_line(command: Command, model: Path, workplace: Path) -> None:
    make_folder("qwen3", workplace / "dense")
    make_folder("qwen3_moe", workplace / "other", tokenizer=None)
    (workplace / "binary.txt").write_bytes(b"ab\x9e")
    for arguments, message in (
        (("generate",), "one of the arguments --ckpt_path --model is required"),
        (("generate", "--model", "gone/small/x"), "--model gone/small/x: there is no such folder"),
        (("audit", "--model", "dense"), "Qwen3ForCausalLM is a dense model: it has no routers"),
        (("validate", "--model", "other"), "no tokenizer can be read there"),
        (("validate", "--model", "small", "--text", "gone.txt"), "gone.txt"),
        (("validate", "--model", "small", "--text", "text.txt", "--inference_num_experts_per_token", "99"), "99"),
        (("analyze", "--model", "small", "--model", "small"), "two models are called 'small'"),
        (("analyze", "--model", "small", "--text", "text.txt", "--sequence_length", "65"), "context is 64"),
        (("generate", "--model", "small", "--ckpt_path", "x"), "not allowed with argument"),
        (("validate", "--model", "small", "--ckpt_path", "x"), "give one of --model and --ckpt_path"),
        (("validate", "--model", "small", "--text", "text.txt", "--sequence_length", "65"), "context is 64"),
        (("validate", "--model", "small", "--text", "binary.txt"), "--text binary.txt: is not UTF-8 text"),
    ):
        code, _, err = command(*arguments)
        assert code == 2, (arguments, err)
        assert message in err
        assert "Traceback" not in err
    assert EXPERTS < 99
    assert not (workplace / "analysis").exists()
