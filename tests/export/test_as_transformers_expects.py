"""What somebody who knows transformers expects of the exported folder: casts, outputs, errors, files."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from helpers.foreign_module import LENGTH
from helpers.small_export import checkpoint_of, load, text, trained
from tokenizers.processors import ByteLevel

from lightning_moe.data import Tokenizer
from lightning_moe.export import export_folder
from lightning_moe.module import LanguageModel
from lightning_moe.routing import ExpertThreshold

HELD = (".router.", ".state.")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["some text to learn pairs from, and some more text"] * 3, 280)


@pytest.fixture(scope="module")
def module() -> LanguageModel:
    return trained(ExpertThreshold(ema_decay=0.5), router="cosine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, module: LanguageModel, tokenizer: Tokenizer) -> Path:
    path = tmp_path_factory.mktemp("export") / "m"
    before = os.umask(0o022)
    try:
        export_folder(path, checkpoint_of(module), tokenizer, "# card")
    finally:
        os.umask(before)
    return path


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(dtype=torch.float16)],
    ids=["to", "half", "bfloat16", "to_dtype"],
)
def test_routers_and_thresholds_survive_every_cast(folder: Path, module: LanguageModel, cast: Any) -> None:
    model, ours = cast(load(folder)), module.decoder.state_dict()
    for name, value in model.state_dict().items():
        held = any(part in name for part in HELD)
        assert (value.dtype == torch.float32) == held, name
        assert not held or torch.equal(value, ours[name])
    with torch.no_grad():
        exact, rounded = load(folder)(text()).logits, model(text()).logits
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.3, rtol=0.1)


def test_a_model_without_a_checkpoint_has_weights(folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.use_deterministic_algorithms(True)  # memory that nobody sets is NaN
    try:
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(value.isfinite().all() for value in model.state_dict().values())


@torch.no_grad()
def test_the_cache_decodes_what_the_full_pass_gives(folder: Path) -> None:
    model, ids = load(folder), text()
    full = model(ids).logits
    first = model(ids[:, :4], use_cache=True)
    name = "cache" if "cache" in first else "past_key_values"  # transformers 5.24 renamed it
    for argument in {"past_key_values", name}:  # ours takes the old name in every version
        past = model(ids[:, :4], use_cache=True)[name]
        for position in range(4, LENGTH):
            step = model(ids[:, position : position + 1], **{argument: past}, use_cache=True)
            torch.testing.assert_close(step.logits[:, 0], full[:, position], atol=1e-5, rtol=1e-5)
    assert name not in model(ids, use_cache=False)


@torch.no_grad()
def test_hidden_states_and_tuples_are_given_when_asked_for(folder: Path, module: LanguageModel) -> None:
    model, ids = load(folder), text()
    expected: list[torch.Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda _, args: expected.append(args[0])) for block in module.decoder.blocks
    ]
    handles.append(module.decoder.head.register_forward_pre_hook(lambda _, args: expected.append(args[0])))
    module(ids)
    for handle in handles:
        handle.remove()
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == len(expected) == 4
    for ours, theirs in zip(expected, output.hidden_states, strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert "hidden_states" not in model(ids)

    found = model(ids, labels=ids, use_cache=False, return_dict=False)
    assert isinstance(found, tuple)
    assert [value.shape for value in found] == [(), output.logits.shape]
    assert torch.equal(found[1], output.logits)

    model.config.output_hidden_states, model.config.return_dict = True, False
    assert [type(value) for value in model(ids, use_cache=False)] == [torch.Tensor, tuple]

    generated = load(folder).generate(
        ids[:, :4], max_new_tokens=2, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
    )
    assert len(generated.hidden_states[0]) == 4


@pytest.mark.parametrize("name", ["output_attentions", "output_router_logits", "token_type_ids", "past"])
def test_an_unknown_argument_is_refused_by_name(folder: Path, name: str) -> None:
    model, ids = load(folder), text()
    with pytest.raises(ValueError, match=f"{name}: this model does not know it"):
        model(ids, **{name: True})
    model(ids, **{name: None})
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


def test_text_beyond_the_context_is_refused(folder: Path) -> None:
    model, ids = load(folder), text(2)
    longer = torch.cat([ids, ids[:, :1]], dim=1)
    with pytest.raises(ValueError, match="17 tokens of context: the model was trained for at most 16"):
        model(longer)
    with pytest.raises(ValueError, match="17 tokens of context"):
        model(ids, position_ids=torch.arange(1, 17)[None])
    with pytest.raises(ValueError, match="a prompt of 17 tokens and 1 new ones: the model's context has room for 16"):
        model.generate(longer, max_new_tokens=1)
    with pytest.raises(ValueError, match="a prompt of 10 tokens and 8 new ones"):
        model.generate(ids[:, :10], max_new_tokens=8)
    with pytest.raises(ValueError, match="a prompt of 10 tokens and 8 new ones"):
        model.generate(input_ids=ids[:, :10], max_length=18)
    with pytest.raises(ValueError, match="a prompt of 10 tokens and 8 new ones"):
        model.generate(ids[:, :10], transformers.GenerationConfig(max_new_tokens=8))
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    assert model.generate(ids[:, :10], max_new_tokens=7, **options).shape == (2, 17)
    assert model.generate(ids[:, :10], **options).shape[1] <= 17
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.int64), ids[:, :10]], dim=1)
    mask = (torch.arange(15) >= 5).long().expand(2, -1)
    found = model.generate(padded, attention_mask=mask, max_new_tokens=7, **options)
    assert torch.equal(found[:, 5:], model.generate(ids[:, :10], max_new_tokens=7, **options))


def test_all_files_have_the_modes_of_the_users_umask(folder: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == dict.fromkeys(modes, 0o644)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_the_tokenizer_file_is_read_back_as_it_was(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert Tokenizer.load(folder / "tokenizer.json").fingerprint == tokenizer.fingerprint
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again("some")["input_ids"] == theirs("some")["input_ids"] == [0, *tokenizer.encode("some")]
    assert Tokenizer.load(tmp_path / "again/tokenizer.json").encode("some") == tokenizer.encode("some")


def test_a_post_processor_of_ones_own_stays(module: LanguageModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_text())
    backend.post_processor = ByteLevel(trim_offsets=False)
    own = Tokenizer(backend, "own")
    export_folder(tmp_path / "m", checkpoint_of(module), own, "")
    assert Tokenizer.load(tmp_path / "m/tokenizer.json").fingerprint == own.fingerprint != tokenizer.fingerprint
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert theirs("some text")["input_ids"] == [0, *own.encode("some text")]


def test_a_pipeline_continues_a_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    export_folder(tmp_path / "m", checkpoint_of(trained(None, vocab_size=280)), tokenizer, "")
    generate = transformers.pipeline("text-generation", model=str(tmp_path / "m"), trust_remote_code=True)
    [found] = generate("some", max_new_tokens=3, do_sample=False)
    assert found["generated_text"].startswith("some")
