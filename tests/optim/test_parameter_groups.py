"""Each trainable parameter is in exactly one group, under the rule and the rate that the paper gives it."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_moe.errors import UserError
from lightning_moe.model import Decoder, DecoderConfig
from lightning_moe.optim import MuonAdamW, OptimizerConfig, build_optimizer
from lightning_moe.optim.grouping import check_groups
from lightning_moe.routing import ExpertThreshold


def decoder(**settings: Any) -> Decoder:
    sizes: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 48, "num_layers": 2, "num_attention_heads": 2, "num_experts": 4
    }  # fmt: skip
    return Decoder(DecoderConfig(**sizes, **settings), ExpertThreshold())


def groups_by_name(module: nn.Module, optimizer: MuonAdamW) -> dict[str, dict[str, Any]]:
    """The groups, each with the names of its parameters under ``names``."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {group["name"]: group | {"names": [names[p] for p in group["params"]]} for group in optimizer.param_groups}


def test_paper_settings() -> None:
    model = decoder(activation="swiglu", router="cosine")
    groups = groups_by_name(model, build_optimizer(model, OptimizerConfig()))
    rates = {name: (group["rule"], group["lr"]) for name, group in groups.items()}
    assert rates == {  # 48 is a sixteenth of 768: rates of embedding and head are four times larger
        "head": ("adamw", pytest.approx(0.016)),
        "embedding": ("adamw", pytest.approx(0.8)),
        "router": ("muon", 0.02),
        "experts": ("muon", 0.02),
        "matrices": ("muon", 0.02),
        "other": ("adamw", 0.003),
    }
    assert groups["head"]["names"] == ["head.weight"]
    assert groups["embedding"]["names"] == ["embedding.weight"]
    assert groups["router"]["names"] == ["blocks.1.moe.router.weight"]
    assert set(groups["experts"]["names"]) == {f"blocks.1.moe.experts.{name}" for name in ("up", "gate", "down")}
    attention = {f"blocks.{i}.attention.{name}.weight" for i in (0, 1) for name in ("query", "key", "value", "output")}
    dense = {
        f"blocks.{place}.{name}.weight"
        for place in ("0.feed_forward", "1.moe.shared_expert")
        for name in ("up", "gate", "down")
    }
    assert set(groups["matrices"]["names"]) == attention | dense
    assert groups["other"]["names"] == ["blocks.1.moe.router.scale"]
    assert {name: groups[name]["output_dim"] for name in ("router", "experts", "matrices")} == {
        "router": -2, "experts": -1, "matrices": -2
    }  # fmt: skip
    assert all(group["weight_decay"] == 0 for group in groups.values())


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("config", [OptimizerConfig(), OptimizerConfig(matrix_rule="adamw")], ids=["muon", "adamw"])
def test_every_parameter_is_in_exactly_one_group(tie_embeddings: bool, config: OptimizerConfig) -> None:
    model = decoder(tie_embeddings=tie_embeddings)
    grouped = [p for group in build_optimizer(model, config).param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))


def test_a_tied_embedding_is_trained_once_as_the_head() -> None:
    model = decoder(tie_embeddings=True)
    groups = groups_by_name(model, build_optimizer(model, OptimizerConfig()))
    assert "embedding" not in groups
    assert [id(p) for p in groups["head"]["params"]] == [id(model.embedding.weight)]


@pytest.mark.parametrize(("matrix_rule", "router_rule", "expected"), [
    ("muon", None, "muon"), ("muon", "adamw", "adamw"), ("adamw", None, "adamw"), ("adamw", "muon", "muon"),
])  # fmt: skip
def test_router_rule(matrix_rule: Any, router_rule: Any, expected: str) -> None:
    model = decoder()
    config = OptimizerConfig(matrix_rule=matrix_rule, router_rule=router_rule, weight_decay=0.1)
    groups = groups_by_name(model, build_optimizer(model, config))
    rates = {"muon": 0.02, "adamw": 0.003}
    assert (groups["router"]["rule"], groups["router"]["lr"]) == (expected, rates[expected])
    for name in ("experts", "matrices"):
        assert (groups[name]["rule"], groups[name]["lr"]) == (matrix_rule, rates[matrix_rule])
    decays = {name: group["weight_decay"] for name, group in groups.items()}
    assert decays == {"head": 0.0, "embedding": 0.0, "router": 0.1, "experts": 0.1, "matrices": 0.1}


def test_settings_arrive() -> None:
    model = decoder(router="cosine")
    config = OptimizerConfig(
        muon_lr=1.0, adamw_lr=2.0, embedding_lr=3.0, head_lr=4.0, reference_hidden_size=None, muon_momentum=0.5,
        adamw_betas=(0.1, 0.2), adamw_eps=0.3,
    )  # fmt: skip
    groups = groups_by_name(model, build_optimizer(model, config))
    assert {name: group["lr"] for name, group in groups.items()} == {
        "head": 4.0, "embedding": 3.0, "router": 1.0, "experts": 1.0, "matrices": 1.0, "other": 2.0
    }  # fmt: skip
    assert groups["experts"]["momentum"] == 0.5
    assert (groups["head"]["betas"], groups["head"]["eps"]) == ((0.1, 0.2), 0.3)


def test_names_do_not_depend_on_where_the_decoder_stands() -> None:
    model = decoder()
    inside = nn.ModuleDict({"decoder": model})
    for one, other in zip(
        build_optimizer(model, OptimizerConfig()).param_groups,
        build_optimizer(inside, OptimizerConfig()).param_groups,
        strict=True,
    ):
        assert one["name"] == other["name"]
        assert list(map(id, one["params"])) == list(map(id, other["params"]))


class ForeignModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 8)
        self.convolution = nn.Conv1d(8, 8, 3)
        self.mixer = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.temperature = nn.Parameter(torch.ones(()))
        self.lm_head = nn.Linear(8, 10)


def test_another_module_gets_sensible_groups() -> None:
    model = ForeignModule()
    groups = groups_by_name(model, build_optimizer(model, OptimizerConfig()))
    assert {name: set(group["names"]) for name, group in groups.items()} == {
        "head": {"lm_head.weight"},
        "embedding": {"tokens.weight"},
        "matrices": {"mixer.in_proj_weight", "mixer.out_proj.weight"},
        "other": {
            "convolution.weight", "convolution.bias", "mixer.in_proj_bias", "mixer.out_proj.bias", "norm.weight",
            "norm.bias", "temperature", "lm_head.bias",
        },
    }  # fmt: skip


def test_frozen_parameters_belong_to_no_group() -> None:
    model = decoder().requires_grad_(False)
    with pytest.raises(UserError, match="Decoder has no trainable parameters"):
        build_optimizer(model, OptimizerConfig())
    model.head.weight.requires_grad_(True)
    groups = groups_by_name(model, build_optimizer(model, OptimizerConfig()))
    assert list(groups) == ["head"]


def test_wrong_groups_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    first, second = model[0].weight, model[1].weight
    model[1].bias.requires_grad_(False)
    groups = [{"params": [first]}, {"params": [second, first, model[1].bias]}]
    with pytest.raises(
        UserError,
        match=r"in no group: \['0.bias'\]; in several groups: \['0.weight'\]; frozen or not of this module: \[\(4,\)\]",
    ):
        check_groups(model, groups)
    check_groups(model, [{"params": [first, model[0].bias]}, {"params": [second]}])


@pytest.mark.parametrize(("settings", "message"), [
    ({"matrix_rule": "sgd"}, r"optimizer.matrix_rule is 'sgd'; must be one of \['muon', 'adamw'\]"),
    ({"router_rule": "sgd"}, "optimizer.router_rule is 'sgd'"),
    ({"head_lr": -0.1}, "optimizer.head_lr is -0.1; must be >= 0"),
    ({"muon_lr": float("nan")}, "optimizer.muon_lr is nan"),
    ({"muon_momentum": 1.0}, "optimizer.muon_momentum is 1.0; must be at least 0 and below 1"),
    ({"adamw_betas": (0.9, 1.5)}, r"optimizer.adamw_betas is \(0.9, 1.5\)"),
    ({"adamw_eps": 0.0}, "optimizer.adamw_eps is 0.0; must be above 0"),
    ({"reference_hidden_size": 0}, "optimizer.reference_hidden_size is 0"),
])  # fmt: skip
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**settings)
