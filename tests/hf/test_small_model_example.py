"""The example that trains a small model: every family learns, balances, and loads again with its tokenizer."""

from __future__ import annotations

import importlib.util
from math import isnan, log
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_moe.data import LocalFiles, TextDataModule, TokenizerConfig

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "small_qwen3_moe.py"
FAMILIES = ("qwen3_moe", "olmoe", "mixtral", "gpt_oss", "deepseek_v3")
VOCABULARY = 280


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("small_qwen3_moe", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TextDataModule:
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"Line {number} of a file.\n" * (number + 20), encoding="utf-8")
    module = TextDataModule(
        LocalFiles([str(folder)]),
        TokenizerConfig(vocab_size=VOCABULARY),
        sequence_length=32,
        global_batch_size=4,
        validation_fraction=0.2,
        cache_dir=str(tmp_path_factory.mktemp("cache")),
    )
    module.prepare_data()
    module.setup("fit")
    return module


def test_families_of_the_test_are_those_of_the_example(example: ModuleType) -> None:
    assert set(FAMILIES) == set(example.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_learns_and_its_folder_has_the_same_loss(
    example: ModuleType, data: TextDataModule, family: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    tokenizer = example.make_tokenizer(data)
    model = example.make_model(family, tokenizer)
    data.setup("fit")
    steps = list(example.train(model, data, 30))
    assert [step for step, _, _ in steps] == list(range(1, 31))
    loss = example.validation_loss(model, data)
    assert loss < log(VOCABULARY) - 1
    for _, _, balance in steps:  # the balancing loss of equal loads is the number of chosen experts
        assert isnan(balance) if family == "deepseek_v3" else abs(balance - example.CHOSEN) < 2
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert example.validation_loss(again, data) == loss
    text = "Line 3 of a file."
    ids = AutoTokenizer.from_pretrained(tmp_path)(text).input_ids
    assert ids == [data.tokenizer.end_of_text_id, *data.tokenizer.encode(text)]


def test_bias_of_deepseek_moves_against_the_load(example: ModuleType, data: TextDataModule) -> None:
    torch.manual_seed(0)
    model = example.make_model("deepseek_v3", example.make_tokenizer(data))
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    router = model.model.layers[1].mlp.gate
    chosen: list[torch.Tensor] = []
    handle = router.register_forward_hook(lambda _, __, output: chosen.append(output[2]))
    model.eval()(batch["input_ids"])
    assert not router.e_score_correction_bias.any()  # evaluation moves nothing
    model.train()(batch["input_ids"])
    handle.remove()
    load = [sum(int(i) == expert for i in chosen[-1].flatten()) for expert in range(example.EXPERTS)]
    mean = sum(load) / len(load)
    step = example.BIAS_STEP
    expected = [0.0 if tokens == mean else step if tokens < mean else -step for tokens in load]
    assert router.e_score_correction_bias.tolist() == pytest.approx(expected)


def test_learning_rate_rises_then_falls_to_zero(example: ModuleType) -> None:
    shares = [example.share_of_learning_rate(step, 200) for step in range(201)]
    top = example.WARMUP_STEPS
    assert shares[0] == pytest.approx(1 / top)
    assert shares[top - 1] == shares[top] == 1.0
    assert shares[200] == 0.0
    assert shares[:top] == sorted(shares[:top])
    assert shares[top:] == sorted(shares[top:], reverse=True)


def test_folder_that_exists_is_refused(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [str(SCRIPT), str(tmp_path)])
    with pytest.raises(SystemExit, match=f"^{tmp_path} exists already. Name a new folder.$"):
        example.main()
    assert not list(tmp_path.iterdir())
