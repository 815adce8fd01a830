"""Healing: only what was chosen is trained, with the gradients of a slow dense model and an untouched teacher."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.hf_models import CONTEXT, DENSE, EXPERTS, make_folder, make_model
from helpers.hf_tokenizers import VOCABULARY
from torch import Tensor, nn

from lightning_moe.errors import UserError
from lightning_moe.hf.digest import model_digest
from lightning_moe.hf.distill import distillation_loss
from lightning_moe.hf.healing import Healing
from lightning_moe.hf.load import load_model
from lightning_moe.hf.pretrained import PretrainedConfig
from lightning_moe.hf.sidecar import write_sidecar
from lightning_moe.hf.trainable import fold
from lightning_moe.module import LanguageModel
from lightning_moe.optim import OptimizerConfig, build_optimizer
from lightning_moe.routing import ExpertThreshold, RoutingRule, TokenChoice

FEW = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
RULE = ExpertThreshold(capacity_factor=None)
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")


def heal(folder: Path, family: str = "qwen3_moe", rule: RoutingRule | None = RULE, **options: Any) -> Healing:
    """A healing of a new tiny model in a folder, whose thresholds let through about a quarter of the pairs."""
    make_folder(family, folder)
    torch.manual_seed(3)
    healing = Healing(PretrainedConfig(str(folder), **options), rule, CONTEXT)
    for layer in healing.lm.layers:
        if "threshold" in layer.state:
            layer.state["threshold"].fill_(-2.0 if layer.log_probabilities else 0.8)
    return healing


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, VOCABULARY, (2, 25), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def step(healing: Healing) -> None:
    healing.lm.train()
    optimizer = build_optimizer(healing.lm, OptimizerConfig(), torch.float32, healing.routers)
    healing.loss(*batch()).loss.backward()
    optimizer.step()


def all_tensors(healing: Healing) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in healing.lm.model.state_dict().items()}


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("train", [["routers"], ["norms"], ["routers", "norms"]])
def test_only_what_was_chosen_changes(family: str, train: list[Any], tmp_path: Path) -> None:
    healing = heal(tmp_path, family, train=train, distill=0.5)
    before = all_tensors(healing)
    step(healing)
    changed = {name for name, tensor in all_tensors(healing).items() if not torch.equal(tensor, before[name])}
    routers = {
        f"{layer.path}.{end}" for layer in healing.lm.layers for end in ("weight", "bias", "e_score_correction_bias")
    }
    norms = {name for name in before if "norm" in name.rpartition(".")[0].rpartition(".")[2]}
    wanted = (routers if "routers" in train else set()) | (norms if "norms" in train else set())
    assert changed
    assert changed <= wanted
    left_out = {name for name in wanted & before.keys() if name not in changed}
    assert all(name.endswith("e_score_correction_bias") for name in left_out), left_out  # it only shifts the choice


@needs_peft
def test_adapters_begin_without_effect_and_leave_the_weights_alone(tmp_path: Path) -> None:
    healing = heal(tmp_path, train=["lora"], distill=0.5, lora_rank=2)
    before, (ids, _) = all_tensors(healing), batch()
    released = load_model(str(tmp_path))
    with torch.no_grad(), healing.lm.as_released():
        assert torch.equal(healing.lm(ids).logits, released(ids).logits)
    step(healing)
    after = all_tensors(healing)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name
        for name in before
        if ".lora_B." in name  # A has no gradient while B is 0
    }
    healing.lm.eval()
    with torch.no_grad():
        expected = healing.lm(ids).logits
        fold(healing.lm)
        assert set(healing.lm.model.state_dict()) == set(released.model.state_dict())
        torch.testing.assert_close(healing.lm(ids).logits, expected)


@pytest.mark.parametrize("family", FEW)
def test_teacher_stays_the_untouched_model(family: str, tmp_path: Path) -> None:
    healing = heal(tmp_path, family, train=["routers", "norms"], distill=1.0)
    released, (ids, _) = load_model(str(tmp_path)), batch()
    for _ in range(2):  # before and after a step
        with torch.no_grad():
            expected = released(ids).logits
            assert torch.equal(healing.lm.to_logits(healing.teacher(ids)), expected)
            assert not torch.equal(healing.lm(ids).logits, expected)
        step(healing)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "glm4_moe"])
def test_gradients_are_those_of_a_dense_model(family: str, tmp_path: Path) -> None:
    """The reference computes all experts for all tokens in float64, with the gates of those not chosen set to 0."""
    healing = heal(tmp_path, family)
    ids, labels = batch()
    healing.lm.train()
    healing.loss(ids, labels).loss.backward()
    masks = [layer.record.selection.mask.flatten(0, 1) for layer in healing.lm.layers if layer.record is not None]
    assert all(0 < mask.double().mean() < 0.6 and len(set(mask.sum(-1).tolist())) > 2 for mask in masks)

    dense = make_model(family)
    dense.set_experts_implementation("eager")
    dense.double()
    routers = [dense.get_submodule(layer.path) for layer in healing.lm.layers]
    for router, mask in zip(routers, masks, strict=True):
        router.register_forward_hook(_all_experts(family, mask))
    logits = dense(ids, use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    for layer, router in zip(healing.lm.layers, routers, strict=True):
        found, expected = layer.router.weight.grad, router.weight.grad
        assert isinstance(found, Tensor)
        assert isinstance(expected, Tensor)
        assert expected.abs().max() > 1e-5
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def _all_experts(family: str, mask: Tensor) -> Any:
    """A hook that sends every token to all experts, with gates by the formula of the family's paper."""

    def hook(router: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits = output[0]
        if family in ("deepseek_v3", "glm4_moe"):
            scores = logits.sigmoid() * mask
            gates = 1.5 * scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)
        elif family == "olmoe":
            gates = logits.softmax(-1) * mask
        else:
            scores = logits.exp() * mask
            gates = scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)
        return logits, gates, torch.arange(EXPERTS).expand(len(gates), EXPERTS)

    return hook


@pytest.mark.parametrize(("temperature", "chunk"), [(1.0, 7), (2.5, 1000)])
def test_distillation_loss_equals_its_formula_in_float64(temperature: float, chunk: int) -> None:
    student, teacher = torch.randn(2, 2, 9, 5)
    student.requires_grad_()
    head, labels = torch.randn(30, 5), torch.randint(30, (2, 9))
    labels[0, 3] = labels[1, 8] = -100
    token_loss, divergence = distillation_loss(student, teacher, lambda x: x @ head.T, labels, 30, temperature, chunk)
    (0.3 * token_loss.mean() + 0.7 * divergence.mean()).backward()

    double = student.detach().double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for b, s in ((b, s) for b in range(2) for s in range(9) if labels[b, s] != -100):
        own, target = double[b, s] @ head.double().T, teacher[b, s].double() @ head.double().T
        p = (target / temperature).softmax(-1)
        kl = (p * (p.log() - (own / temperature).log_softmax(-1))).sum() * temperature**2
        loss = -own.log_softmax(-1)[labels[b, s]]
        torch.testing.assert_close(token_loss[b, s].double(), loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(divergence[b, s].double(), kl, rtol=1e-5, atol=1e-5)
        total = total + (0.3 * loss + 0.7 * kl) / 18
    total.backward()
    assert token_loss[0, 3] == divergence[0, 3] == 0
    assert student.grad is not None
    assert double.grad is not None
    torch.testing.assert_close(student.grad.double(), double.grad, rtol=1e-4, atol=1e-6)


def test_weight_of_the_distillation_mixes_both_losses(tmp_path: Path) -> None:
    losses = {}
    for weight in (0.0, 0.25, 1.0):
        healing = heal(tmp_path, distill=weight)
        healing.lm.train()
        losses[weight] = healing.loss(*batch())
    alone, mixed, whole = losses[0.0], losses[0.25], losses[1.0]
    torch.testing.assert_close(mixed.token_loss, alone.token_loss)
    assert alone.distillation is None
    assert whole.distillation is not None
    torch.testing.assert_close(whole.loss, whole.distillation)
    torch.testing.assert_close(mixed.loss, 0.75 * alone.loss + 0.25 * whole.loss)


def test_weights_in_bfloat16_are_trained_in_float32(tmp_path: Path) -> None:
    make_folder("qwen3_moe", tmp_path, dtype=torch.bfloat16)
    healing = Healing(PretrainedConfig(str(tmp_path), dtype="bfloat16"), RULE, CONTEXT)
    assert healing.digest == model_digest(load_model(str(tmp_path)))
    released, (ids, _) = load_model(str(tmp_path)), batch()
    with torch.no_grad():
        assert torch.equal(healing.lm.to_logits(healing.teacher(ids)), released(ids).logits)
    assert {parameter.dtype for parameter in healing.trained.values()} == {torch.float32}
    with torch.no_grad():
        for parameter in healing.trained.values():
            parameter += 1e-4  # too little for bfloat16 at most places
    fold(healing.lm)
    assert {p.dtype for p in healing.lm.model.parameters()} == {torch.bfloat16}
    assert healing.lm.model.state_dict().keys() == released.model.state_dict().keys()


def test_routers_have_the_optimizer_group_of_routers(tmp_path: Path) -> None:
    healing = heal(tmp_path, train=["routers", "norms"])
    optimizer = build_optimizer(healing.lm, OptimizerConfig(matrix_rule="muon"), torch.float32, healing.routers)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert groups.keys() == {"router", "other"}
    assert groups["router"]["rule"] == "muon"
    assert set(groups["router"]["params"]) == healing.routers
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(healing.trained)


def test_state_dict_holds_what_was_trained_and_loads_into_a_fresh_model(tmp_path: Path) -> None:
    healing = heal(tmp_path, train=["routers", "norms"], distill=0.5)
    step(healing)
    saved = healing.lm.state_dict()
    assert set(saved) == set(healing.trained) | {name for name in saved if name.startswith("moe.")}
    assert not any("expert" in name and "moe." not in name[:4] for name in saved)
    fresh = Healing(healing.config, RULE, CONTEXT)
    assert fresh.lm.load_state_dict(saved).unexpected_keys == []
    ids, _ = batch()
    with torch.no_grad():
        assert torch.equal(fresh.lm.eval()(ids).logits, healing.lm.eval()(ids).logits)
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.lm.load_state_dict({name: value for name, value in saved.items() if "norm" not in name})


def test_thresholds_of_a_sidecar_are_the_start(tmp_path: Path) -> None:
    make_folder("qwen3_moe", tmp_path / "model")
    lm = load_model(str(tmp_path / "model"))
    lm.route_by(ExpertThreshold(), 1.5)
    for layer in lm.layers:
        layer.state["threshold"].normal_()
    (tmp_path / "thresholds").mkdir()
    write_sidecar(tmp_path / "thresholds", lm, str(tmp_path / "model"), {})
    options: dict[str, Any] = {"path": str(tmp_path / "model"), "thresholds": str(tmp_path / "thresholds")}
    healing = Healing(PretrainedConfig(num_experts_per_token=1.5, **options), RULE, CONTEXT)
    for layer, own in zip(healing.lm.layers, lm.layers, strict=True):
        assert torch.equal(layer.state["threshold"], own.state["threshold"])
        assert layer.rule == RULE
    with pytest.raises(UserError, match=r"was made for 1.5 experts per token, but .*num_experts_per_token is 2"):
        Healing(PretrainedConfig(**options), RULE, CONTEXT)
    with pytest.raises(UserError, match="TokenChoice chooses by no thresholds"):
        Healing(PretrainedConfig(num_experts_per_token=1, **options), TokenChoice(), CONTEXT)
    options["thresholds"] = str(tmp_path / "model")
    with pytest.raises(UserError, match=r"thresholds=.*has no routing.json; `calibrate --model` writes one"):
        Healing(PretrainedConfig(**options), RULE, CONTEXT)


def test_bad_settings_have_one_clear_line(tmp_path: Path) -> None:
    make_folder("qwen3_moe", tmp_path / "model")
    make_folder(DENSE, tmp_path / "dense")
    path = str(tmp_path / "model")
    for options, rule, length, message in (
        ({"path": str(tmp_path / "dense")}, RULE, 16, "Qwen3ForCausalLM is a dense model"),
        ({"path": str(tmp_path / "none")}, RULE, 16, r"pretrained.path=.*/none: there is no such folder"),
        ({"path": path, "num_experts_per_token": 9}, RULE, 16, r"num_experts_per_token=9: the model has 8 experts"),
        ({"path": path, "num_experts_per_token": 0}, RULE, 16, r"num_experts_per_token=0: the model has 8 experts"),
        ({"path": path, "num_experts_per_token": 1.5}, TokenChoice(), 16, "model.pretrained.num_experts_per_token=1.5"),
        ({"path": path}, None, 16, r"model.routing=null: a released model keeps its experts"),
        ({"path": path}, RULE, CONTEXT + 1, rf"data.sequence_length={CONTEXT + 1}: the context"),
        ({"path": path, "train": ["routers", "heads"]}, RULE, 16, r"train=\['routers', 'heads'\]: must be"),
        ({"path": path, "train": []}, RULE, 16, r"train=\[\]: must be a list"),
        ({"path": path, "distill": 1.5}, RULE, 16, r"distill=1.5: must be from 0 to 1"),
        ({"path": path, "temperature": 0.0}, RULE, 16, r"temperature=0.0: must be above 0"),
        ({"path": path, "lora_rank": 0}, RULE, 16, r"lora_rank=0: must be at least 1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message) as found:
            Healing(PretrainedConfig(**options), rule, length)
        assert "\n" not in str(found.value)
    with pytest.raises(UserError, match=r"model.compile=true"):
        LanguageModel(pretrained=PretrainedConfig(path), compile=True)


def test_model_in_its_folder_is_only_read(tmp_path: Path) -> None:
    make_folder("mixtral", tmp_path, sharded=True)

    def content() -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}

    before = content()
    step(Healing(PretrainedConfig(str(tmp_path), distill=0.5), RULE, CONTEXT))
    assert content() == before
