"""The tiny models for tests of released models: each runs, is worth testing with, and survives its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.hf_models import (
    CHOSEN,
    CONTEXT,
    DENSE,
    EXPERTS,
    FAMILIES,
    HIDDEN,
    OTHER_FAMILIES,
    make_folder,
    make_model,
)
from tests.helpers.hf_tokenizers import END_OF_TEXT, END_OF_TEXT_ID, VOCABULARY, TokenizerKind, make_tokenizer

MIXTURES = (*FAMILIES, *OTHER_FAMILIES)


def some_ids(seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (2, CONTEXT), generator=torch.Generator().manual_seed(seed))


def router_logits(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Multiply what enters each router by its weight, float32 [tokens, experts] per layer."""
    logits: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, Tensor)
        product = inputs[0].detach().float().reshape(-1, HIDDEN) @ weight.float().T
        logits.append(product if bias is None else product + bias.float())

    endings = (".gate", ".router", ".router.layer", ".gate.wg")
    for name, module in model.named_modules():
        if name.endswith(endings) and isinstance(getattr(module, "weight", None), Tensor):
            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(ids)
    return logits


@pytest.mark.parametrize("family", MIXTURES)
def test_routers_spread_their_choices_and_have_no_ties(family: str) -> None:
    layers = router_logits(make_model(family), some_ids())
    assert layers
    for logits in layers:
        assert logits.shape == (2 * CONTEXT, EXPERTS)
        assert 0.8 < logits.std() < 3
        best = logits.topk(CHOSEN + 1).values
        assert (best[:, CHOSEN - 1] > best[:, CHOSEN]).all()
        chosen = torch.bincount(logits.topk(CHOSEN).indices.flatten(), minlength=EXPERTS)
        assert (chosen > 0).sum() >= EXPERTS - 1


@pytest.mark.parametrize(
    "family",
    ["deepseek_v3", "glm4_moe", "nemotron_h", "nemotron_h_latent", "ernie4_5_moe", "dots1", "minimax_m2", "lfm2_moe"],
)
def test_bias_decides_some_choices_but_not_all(family: str) -> None:
    model = make_model(family)
    biases = [
        tensor for name, tensor in model.state_dict().items() if name.endswith(("correction_bias", "expert_bias"))
    ]
    layers = router_logits(model, some_ids())
    assert len(biases) == len(layers)
    for logits, bias in zip(layers, biases, strict=True):
        scores = logits.softmax(-1) if family == "ernie4_5_moe" else logits.sigmoid()
        without, with_bias = (x.topk(CHOSEN).indices.sort().values for x in (scores, scores + bias.flatten()))
        changed = (without != with_bias).any(-1).float().mean()
        assert 0.1 < changed < 0.95


@pytest.mark.parametrize("family", [*MIXTURES, DENSE])
def test_model_generates_what_the_whole_pass_predicts(family: str) -> None:
    model, ids = make_model(family), some_ids()[:1, :20]
    with torch.no_grad():
        written = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
        predicted = model(written[:, :-1]).logits[:, ids.shape[1] - 1 :].argmax(-1)
    assert torch.equal(written[:, ids.shape[1] :], predicted)


@pytest.mark.parametrize("family", [*MIXTURES, DENSE])
@pytest.mark.parametrize(("dtype", "sharded"), [(torch.float32, True), (torch.bfloat16, False)])
def test_folder_loads_again_bit_for_bit(family: str, dtype: torch.dtype, sharded: bool, tmp_path: Path) -> None:
    saved = make_folder(family, tmp_path, sharded=sharded, dtype=dtype)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    before, after = saved.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    with torch.no_grad():
        assert torch.equal(saved(some_ids()).logits, loaded(some_ids()).logits)


def test_seed_decides_the_model() -> None:
    state = torch.get_rng_state()
    first, again, other = (make_model("mixtral", seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["byte_level", "nfc", "metaspace"])
def test_tokenizer_of_the_folder_is_the_one_asked_for(kind: TokenizerKind, tmp_path: Path) -> None:
    make_folder("mixtral", tmp_path, tokenizer=kind)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == VOCABULARY
    text = "Routers choose  experts;\n\tcafe\u0301 \U0001f99c"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert max(ids) < VOCABULARY
    composed = text.replace("e\u0301", "\u00e9")
    assert tokenizer.decode(ids) == (composed if kind == "nfc" else text)
    backend = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert bool(backend["model"].get("byte_fallback")) == (kind == "metaspace")


def test_end_of_text_is_one_token() -> None:
    assert make_tokenizer().convert_tokens_to_ids(END_OF_TEXT) == END_OF_TEXT_ID == make_tokenizer().eos_token_id
    assert make_tokenizer("metaspace")("a").input_ids[0] == make_tokenizer("metaspace").bos_token_id


def test_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    make_folder("olmoe", tmp_path, tokenizer=None)
    assert not list(tmp_path.glob("tokenizer*"))
