"""Sizes that cannot be are refused with the key's name; published and hand-counted parameter numbers."""

import pytest
import torch

from lightning_moe.errors import UserError
from lightning_moe.model import Decoder, DecoderConfig, ModelSize, model_size
from lightning_moe.routing import ExpertChoice, ExpertThreshold, TokenChoice


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("vocab_size=0", {"vocab_size": 0}),
        ("max_sequence_length=0", {"max_sequence_length": 0}),
        ("hidden_size=0", {"hidden_size": 0}),
        ("num_layers=0", {"num_layers": 0}),
        ("num_attention_heads=5", {"num_attention_heads": 5}),  # no divisor of 192
        ("num_attention_heads=64", {"num_attention_heads": 64}),  # heads of 3: odd
        ("num_attention_heads=0", {"num_attention_heads": 0}),
        ("num_key_value_heads=2", {"num_key_value_heads": 2}),  # no divisor of 3
        ("num_key_value_heads=0", {"num_key_value_heads": 0}),
        ("num_experts=0", {"num_experts": 0}),
        ("num_experts_per_token=17", {"num_experts_per_token": 17}),
        ("num_experts_per_token=0", {"num_experts_per_token": 0}),
        ("num_experts_per_token=nan", {"num_experts_per_token": float("nan")}),
        (r"num_experts_per_token=\[1, 1\]", {"num_experts_per_token": [1, 1]}),  # three MoE layers
        (r"num_experts_per_token=\[1, 0, 1\]", {"num_experts_per_token": [1, 0, 1]}),
        ("num_shared_experts=-1", {"num_shared_experts": -1}),
        ("expert_hidden_size=0", {"expert_hidden_size": 0}),
        ("num_dense_layers=-1", {"num_dense_layers": -1}),
        ("logit_softcap=0", {"logit_softcap": 0}),
        (r"num_experts_per_token=\[\]", {"num_experts_per_token": [], "num_dense_layers": 4}),
        ("num_experts_per_token=99", {"num_experts_per_token": 99, "num_dense_layers": 4}),
        ("activation='gelu'", {"activation": "gelu"}),
        ("gate='tanh'", {"gate": "tanh"}),
        ("router='bilinear'", {"router": "bilinear"}),
    ],
)
def test_impossible_values_are_refused_by_key(key: str, options: dict[str, object]) -> None:
    fitting = {"hidden_size": 192, "num_layers": 4, "num_attention_heads": 3, "num_experts": 16}
    with pytest.raises(UserError, match=rf"model\.decoder\.{key}: must be "):
        DecoderConfig(**{**fitting, **options})


def test_a_fractional_rate_is_for_rules_that_choose_tokens() -> None:
    config = DecoderConfig(num_experts_per_token=1.5)
    with torch.device("meta"):
        Decoder(config, ExpertThreshold())
        Decoder(config, ExpertChoice())
        with pytest.raises(UserError, match=r"num_experts_per_token=1\.5: TokenChoice"):
            Decoder(config, TokenChoice())


PAPER = {
    name: DecoderConfig(
        vocab_size=65536,
        max_sequence_length=2048,
        hidden_size=64 * layers,
        num_layers=layers,
        num_attention_heads=layers // 2,
    )
    for name, layers in (("d12", 12), ("d20", 20))
}


@pytest.mark.parametrize(("name", "total", "active"), [("d12", 575, 186), ("d20", 2429, 561)])
def test_papers_models_have_the_published_parameters(name: str, total: int, active: int) -> None:
    """In millions; d12's active number is by hand (the paper's 195M does not follow from its settings)."""
    size = model_size(PAPER[name], ExpertThreshold())
    assert round(size.total_parameters / 1e6) == total
    assert round(size.active_parameters / 1e6) == active


def test_parameters_and_flops_counted_by_hand() -> None:
    """V=10, S=6, D=8, 3 layers (1 dense), 4 + 1 experts of 12, 1 routed per token, 2 heads on 1 key/value head."""
    config = DecoderConfig(
        vocab_size=10, max_sequence_length=6, hidden_size=8, num_layers=3, num_attention_heads=2, num_key_value_heads=1,
        num_experts=4, expert_hidden_size=12,
    )  # fmt: skip
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8
    dense, expert, router = 2 * 8 * 24, 2 * 8 * 12, 4 * 8
    total = 2 * 10 * 8 + 3 * attention + dense + 2 * (router + 5 * expert)
    active = 2 * 10 * 8 + 3 * attention + dense + 2 * (router + 2 * expert)
    flops = 6 * (active - 10 * 8) + 3 * 3 * (2 * 2 * 8 * 6 / 2)  # 3 passes, scores and values, half the window
    assert model_size(config, ExpertThreshold()) == ModelSize(total, active, int(flops))
    built = Decoder(config, ExpertThreshold())
    assert sum(parameter.numel() for parameter in built.parameters()) == total


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_experts_per_token": 2, "num_shared_experts": 0},
        {"num_experts_per_token": [1, 0.5, 4], "num_dense_layers": 1},
        {"activation": "swiglu", "num_shared_experts": 2, "num_dense_layers": 2},
        {"tie_embeddings": True},
        {"num_dense_layers": 4, "num_experts_per_token": 2},
    ],
    ids=str,
)
def test_dense_and_moe_have_the_same_active_flops_up_to_the_router(options: dict[str, object]) -> None:
    config = DecoderConfig(**options)
    dense, moe = model_size(config, None), model_size(config, ExpertThreshold())
    routers = config.num_moe_layers * config.num_experts * config.hidden_size
    assert moe.active_parameters - dense.active_parameters == routers
    assert moe.flops_per_token - dense.flops_per_token == 6 * routers
    assert dense.total_parameters == dense.active_parameters


def test_a_model_without_moe_layers_has_the_feed_forward_size_of_the_config() -> None:
    config = DecoderConfig(num_dense_layers=4, num_experts_per_token=3, expert_hidden_size=32)
    with torch.device("meta"):
        model = Decoder(config, ExpertThreshold())
    assert {block.feed_forward.up.out_features for block in model.blocks} == {(1 + 3) * 32}


def test_counting_allocates_nothing_and_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    model_size(PAPER["d20"], ExpertThreshold())
    assert torch.equal(torch.get_rng_state(), before)
