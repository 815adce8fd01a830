"""The exported folder under transformers: our logits, our routing, our generation; and the way back."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from helpers.small_export import checkpoint_of, load, text, trained
from safetensors.torch import save_file
from torch import Tensor

from lightning_moe.checkpoints.integrity import damage
from lightning_moe.data import Tokenizer
from lightning_moe.errors import UserError
from lightning_moe.export import export_folder
from lightning_moe.model import generate
from lightning_moe.module import LanguageModel
from lightning_moe.routing import (
    CausalChoice,
    ExpertChoice,
    ExpertThreshold,
    Phase,
    PooledStatistics,
    QuantileBalancing,
    RoutingRule,
    RoutingState,
    Selection,
    TokenChoice,
    TokenChoiceLossFree,
)

RULES: dict[str, RoutingRule | None] = {
    "dense": None,
    "ET": ExpertThreshold(ema_decay=0.5),
    "EC": ExpertChoice(ema_decay=0.5),
    "TC": TokenChoice(),
    "loss_free": TokenChoiceLossFree(bias_update_rate=0.3),
    "QB": QuantileBalancing(),
}


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    Tokenizer.train(["some text to learn pairs from, and some more text"] * 3, 280).save(path)
    return path


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        *((name, {}) for name in RULES),
        ("ET", {"activation": "swiglu", "router": "cosine", "num_shared_experts": 0, "num_key_value_heads": 1}),
        ("ET", {"tie_embeddings": True, "logit_softcap": None, "num_experts_per_token": [0.5, 2]}),
        ("TC", {"gate": "softmax", "normalize_gates": True, "num_experts_per_token": 2}),
    ],
    ids=str,
)
def test_logits_routing_and_generation_are_ours(
    tmp_path: Path, tokenizer_file: Path, rule: str, options: dict[str, Any]
) -> None:
    module = trained(RULES[rule], **options)
    folder = tmp_path / "model"
    export_folder(folder, checkpoint_of(module), Tokenizer.load(tokenizer_file), "# card")
    model, ids = load(folder), text()
    with torch.no_grad():
        expected, found = module(ids), model(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        module.decoder.moe_layers(), (b.moe for b in model.blocks if b.moe is not None), strict=True
    ):
        assert torch.equal(theirs.select(ours.record.logits), ours.record.selection.mask)

    prompt = ids[:, :5]
    expected_ids = generate(module.decoder, prompt, 6, temperature=0.0)
    found_ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    for row, expected_row in zip(found_ids, expected_ids, strict=True):
        end = (row[5:] == 0).nonzero()  # <|endoftext|> ends it there; ours goes on
        length = 5 + int(end[0]) + 1 if len(end) else 11
        assert torch.equal(row[:length], expected_row[:length])

    again = LanguageModel.load_from_checkpoint(folder)
    assert json.loads(json.dumps(dict(again.hparams))) == json.loads(json.dumps(dict(module.hparams)))
    state = again.state_dict()
    assert list(state) == list(module.state_dict())
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())


def test_padding_on_the_left_changes_nothing(tmp_path: Path, tokenizer_file: Path) -> None:
    module = trained(RULES["ET"])
    export_folder(tmp_path / "m", checkpoint_of(module), Tokenizer.load(tokenizer_file), "")
    model, ids = load(tmp_path / "m"), text(1)[:, :6]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], dim=1)
    mask = (torch.arange(9) >= 3).long()[None]
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        alone, after = model(ids).logits, model(padded, attention_mask=mask, position_ids=position).logits
    torch.testing.assert_close(after[:, 3:], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_routers_and_thresholds_stay_float32_bit_for_bit(tmp_path: Path, tokenizer_file: Path, dtype: Any) -> None:
    module = trained(RULES["ET"], router="cosine")
    export_folder(tmp_path / "m", checkpoint_of(module), Tokenizer.load(tokenizer_file), "")
    model = load(tmp_path / "m", dtype=dtype)
    ours, theirs = module.decoder.state_dict(), model.state_dict()
    kept = [name for name in theirs if ".router." in name or ".state." in name]
    assert len(kept) == 2 * (2 + 4)
    for name, value in theirs.items():
        if name in kept:
            assert value.dtype == torch.float32
            assert torch.equal(value, ours[name])
        else:
            assert value.dtype == dtype
    with torch.no_grad():
        assert model(text()).logits.isfinite().all()


def test_the_tokenizer_is_ours(tmp_path: Path, tokenizer_file: Path) -> None:
    module = trained(None)
    export_folder(tmp_path / "m", checkpoint_of(module), Tokenizer.load(tokenizer_file), "")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m", trust_remote_code=True)
    for sample in ("some text", "  two  spaces\n\tand more é🦜", "a <|endoftext|> inside", ""):
        ours = Tokenizer.load(tokenizer_file)
        assert tokenizer(sample)["input_ids"] == [ours.end_of_text_id, *ours.encode(sample)]
        assert tokenizer(sample, add_special_tokens=False)["input_ids"] == ours.encode(sample)
        assert tokenizer.decode(tokenizer(sample)["input_ids"][1:]) == sample
    assert tokenizer.eos_token_id == 0


def test_a_tokenizer_with_another_end_of_text(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["some text to learn pairs from"] * 3, trainer)
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    end = backend.token_to_id("<|endoftext|>")
    assert end == 260

    export_folder(tmp_path / "m", checkpoint_of(trained(None)), Tokenizer.load(tmp_path / "tokenizer.json"), "")
    model, tokenizer = load(tmp_path / "m"), transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    for source in (model.config, model.generation_config, tokenizer):
        assert {source.bos_token_id, source.eos_token_id, source.pad_token_id} == {end}
    assert tokenizer("some")["input_ids"] == [end, *Tokenizer.load(tmp_path / "tokenizer.json").encode("some")]


def test_loss_and_saving_again(tmp_path: Path, tokenizer_file: Path) -> None:
    module = trained(RULES["ET"])
    export_folder(tmp_path / "m", checkpoint_of(module), Tokenizer.load(tokenizer_file), "")
    model, ids = load(tmp_path / "m"), text()
    with torch.no_grad():
        found = model(ids, labels=ids).loss
        logits = module(ids).double()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(found) == pytest.approx(float(expected), abs=1e-5)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": True}], ids=str)
def test_what_transformers_saved_in_several_files_is_read_back(
    tmp_path: Path, tokenizer_file: Path, options: dict[str, Any]
) -> None:
    module, again = trained(RULES["ET"], **options), tmp_path / "again"
    export_folder(tmp_path / "m", checkpoint_of(module), Tokenizer.load(tokenizer_file), "")
    load(tmp_path / "m").save_pretrained(again, max_shard_size="10KB")
    shards = sorted(again.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert damage(again) is None
    state = LanguageModel.load_from_checkpoint(again).state_dict()
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    shards[1].rename(tmp_path / "elsewhere")
    assert shards[1].name in (damage(again) or "")
    with pytest.raises(UserError, match=f"again: not a whole export of lightning_moe: .*{shards[1].name}"):
        LanguageModel.load_from_checkpoint(again)
    index = again / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shards[1].name, "../elsewhere"))
    with pytest.raises(UserError, match=r"'\.\./elsewhere' is not the name of a file in the folder"):
        LanguageModel.load_from_checkpoint(again)


@pytest.mark.parametrize("rule", ["Own", "OwnThresholds", "OwnTokenChoice"])
def test_other_rules_are_refused(tmp_path: Path, tokenizer_file: Path, rule: str) -> None:
    module = trained(None)
    routing = {"class_path": f"{__name__}.{rule}", "init_args": {}}
    theirs = checkpoint_of(module) | {"hyper_parameters": {**module.hparams, "routing": routing}}
    with pytest.raises(UserError, match=rf"model.routing={rule}: it declares no causal_choice \(one of THRESHOLD, "):
        export_folder(tmp_path / "m", theirs, Tokenizer.load(tokenizer_file), "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rule", ["Lies", "LiesByItsScores", "IgnoresBias"])
def test_a_rule_that_declares_what_it_does_not_do_is_refused(tmp_path: Path, tokenizer_file: Path, rule: str) -> None:
    module = trained(globals()[rule]())
    for name, value in module.state_dict().items():
        if name.endswith("2.moe.state.selection_bias"):  # every layer is looked at
            value.copy_(torch.arange(4))
        elif name.endswith("selection_bias"):
            value.zero_()
    with pytest.raises(UserError, match=f"model.routing={rule}: its causal_choice T.* is not what its select does"):
        export_folder(tmp_path / "m", checkpoint_of(module), Tokenizer.load(tokenizer_file), "")
    assert not list(tmp_path.iterdir())


def test_a_derived_rule_is_exported_as_what_it_declares(tmp_path: Path, tokenizer_file: Path) -> None:
    module = trained(Derived())
    export_folder(tmp_path / "m", checkpoint_of(module), Tokenizer.load(tokenizer_file), "")
    model, ids = load(tmp_path / "m"), text()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, module(ids), rtol=1e-5, atol=1e-5)
    assert next(module.decoder.moe_layers()).state["threshold"].unique().numel() == 1  # by its own update
    again = LanguageModel.load_from_checkpoint(tmp_path / "m")
    assert next(again.decoder.moe_layers()).rule == Derived()


def test_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.json").write_text("{}")
    with pytest.raises(UserError, match=r"theirs: not a whole export of lightning_moe: .*lightning_moe: is missing"):
        LanguageModel.load_from_checkpoint(tmp_path / "theirs")
    save_file({"weight": torch.zeros(2)}, tmp_path / "theirs.safetensors")
    with pytest.raises(UserError, match=r"theirs.safetensors: not a whole export of lightning_moe: .* have no .step."):
        LanguageModel.load_from_checkpoint(tmp_path / "theirs.safetensors")


class Own(RoutingRule):
    """A rule that nobody else knows."""

    def select(self, logits: Tensor, state: Any, phase: Any) -> Any:
        raise NotImplementedError


class OwnThresholds(ExpertThreshold):
    """Like a rule that we export, and yet another."""

    select = Own.select


class OwnTokenChoice(TokenChoice):
    """The same."""

    select = Own.select


@dataclass(frozen=True)
class Derived(ExpertThreshold):
    """Another default, another update, the same choice at inference."""

    ema_decay: float = 0.5

    def update(self, state: RoutingState, statistics: PooledStatistics) -> None:
        super().update(state, statistics)
        state["threshold"].fill_(state["threshold"].mean())


@dataclass(frozen=True)
class Lies(ExpertThreshold):
    """A token that no expert would take goes to the best one."""

    causal_choice = CausalChoice.THRESHOLD

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        mask = super().select(logits, state, phase).mask
        best = logits == logits.amax(-1, keepdim=True)
        return Selection(torch.where(mask.any(-1, keepdim=True), mask, best))


@dataclass(frozen=True)
class LiesByItsScores(TokenChoice):
    """It overrides what `select` calls."""

    def selection_scores(self, logits: Tensor, state: RoutingState) -> Tensor:
        return logits.abs()


class IgnoresBias(TokenChoiceLossFree):
    """The exported code would add the bias."""

    selection_scores = TokenChoice.selection_scores
