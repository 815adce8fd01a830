"""Sampling: greedy and seeded determinism, top-k and top-p against a slow reference, refused input; prompts of
different lengths, and routing, against full forward passes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.model import Decoder, DecoderConfig, generate, generate_stream
from lightning_moe.model.generate import _sample
from lightning_moe.routing import ExpertChoice, ExpertThreshold, Phase, QuantileBalancing, RoutingRule, TokenChoice


def make_model(rule: RoutingRule | None, num_layers: int = 2) -> Decoder:
    config = DecoderConfig(
        vocab_size=24,
        max_sequence_length=10,
        hidden_size=16,
        num_layers=num_layers,
        num_attention_heads=2,
        num_experts=4,
    )
    model = Decoder(config, rule)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.fixture
def model() -> Decoder:
    return make_model(ExpertThreshold())


def test_greedy_takes_the_most_likely_token_of_the_full_forward(model: Decoder) -> None:
    prompt = torch.randint(0, 24, (3, 4))
    tokens = generate(model, prompt, 7, temperature=0.0)  # the last one needs no forward: 10 + 1 tokens
    assert tokens.shape == (3, 11)
    assert torch.equal(tokens[:, :4], prompt)
    model.eval()
    for end in range(4, 11):
        assert torch.equal(model(tokens[:, :end]).logits[:, -1].argmax(-1), tokens[:, end])


def test_a_seed_fixes_the_sample_and_leaves_the_global_generator_alone(model: Decoder) -> None:
    prompt = torch.randint(0, 24, (2, 3))
    before = torch.get_rng_state()
    samples = [generate(model, prompt, 6, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_generation_routes_causally_and_puts_the_mode_back(model: Decoder) -> None:
    model.train()
    phases = []
    layer = next(model.moe_layers())
    layer.register_forward_hook(lambda module, *_: phases.append(module.phase))
    generate(model, torch.zeros(1, 1, dtype=torch.int64), 3)
    assert phases == [Phase.CAUSAL] * 3
    assert model.training
    generate(model.eval(), torch.zeros(1, 1, dtype=torch.int64), 1)
    assert not model.training
    with pytest.raises(RuntimeError):
        generate(model.train(), torch.zeros(1, 1), 1)  # floats are no tokens: the mode is put back all the same
    assert model.training


def reference_probabilities(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> list[float]:
    """Of one row, in plain Python."""
    peak = max(logits)
    weights = [math.exp((logit - peak) / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])
    kept = order[: len(order) if top_k is None else top_k]
    if top_p is not None:
        total, reached = sum(weights[i] for i in kept), 0.0
        nucleus = []
        for i in kept:
            if reached >= top_p * total:
                break
            nucleus.append(i)
            reached += weights[i]
        kept = nucleus
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@given(
    seed=st.integers(0, 2**31),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    top_k=st.sampled_from([None, 1, 3, 6, 100]),
    top_p=st.sampled_from([None, 0.2, 0.65, 0.9, 1.0]),
)
def test_sampled_tokens_have_the_reference_probabilities(
    seed: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = torch.randn(6, generator=torch.Generator().manual_seed(seed)) * 2
    expected = torch.tensor(reference_probabilities(logits.double().tolist(), temperature, top_k, top_p))
    draws = 4000
    generator = torch.Generator().manual_seed(0)
    tokens = _sample(logits.expand(draws, 6), temperature, top_k, top_p, generator)
    assert tokens.shape == (draws, 1)
    share = torch.bincount(tokens[:, 0], minlength=6) / draws
    assert not share[expected == 0].any()
    tolerance = 6 * (expected * (1 - expected) / draws).sqrt() + 1e-6
    assert ((share - expected).abs() <= tolerance).all()


PROMPT = torch.zeros(1, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (PROMPT, {"max_new_tokens": 8}, r"prompt of 4 tokens \+ max_new_tokens=8: .*at most .* = 11"),
        (PROMPT[:, :0], {"max_new_tokens": 1}, r"prompt of 0 tokens"),
        (PROMPT, {"max_new_tokens": -1}, r"max_new_tokens=-1"),
        (PROMPT, {"max_new_tokens": 1, "temperature": -1.0}, r"temperature=-1\.0"),
        (PROMPT, {"max_new_tokens": 1, "top_k": 0}, r"top_k=0"),
        (PROMPT, {"max_new_tokens": 1, "top_p": 0.0}, r"top_p=0\.0"),
        (PROMPT, {"max_new_tokens": 1, "top_p": 1.5}, r"top_p=1\.5"),
    ],
)
def test_impossible_requests_are_refused(
    model: Decoder, prompt: Tensor, options: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate(model, prompt, **options)


PROMPTS = [[3], [1, 2, 3, 4, 5], [7, 8]]
RULES = [ExpertThreshold(), ExpertChoice(), TokenChoice(), QuantileBalancing(), None]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_each_row_is_what_it_would_be_alone_and_routes_as_the_full_forward(rule: RoutingRule | None) -> None:
    model = make_model(rule, num_layers=3)
    chunks = list(generate_stream(model, PROMPTS, 5, temperature=0.0, with_experts=True))
    tokens = torch.cat([chunk.tokens for chunk in chunks], dim=1)
    experts = torch.cat([chunk.experts for chunk in chunks], dim=1)
    sampled = torch.cat([chunk.sampled for chunk in chunks], dim=1)
    assert experts.shape == ((3, 10, 0, 0) if rule is None else (3, 10, 2, 4))
    model.eval()
    for row, prompt in enumerate(PROMPTS):
        end = len(prompt) + 5
        alone = generate(model, torch.tensor([prompt]), 5, temperature=0.0)
        assert tokens[row, :end].tolist() == alone[0].tolist()
        assert sampled[row].tolist() == [len(prompt) <= position < end for position in range(10)]
        model(alone)
        for index, layer in enumerate(model.moe_layers()):
            assert torch.equal(experts[row, :end, index], layer.record.selection.mask[0])
    if rule is not None:
        assert experts[:, :, 0].any()


def test_a_row_that_stops_does_not_stop_the_others(model: Decoder) -> None:
    seen: list[tuple[int, list[int]]] = []

    def stop(row: int, new: list[int]) -> bool:
        seen.append((row, list(new)))
        return row == 0 and len(new) == 2

    chunks = list(generate_stream(model, PROMPTS, 4, seed=1, stop=stop))
    sampled = torch.cat([chunk.sampled for chunk in chunks], dim=1)
    assert sampled.sum(1).tolist() == [2, 4, 4]
    assert [len(new) for row, new in seen if row == 1] == [1, 2, 3, 4]
    assert not any(chunk.experts is not None for chunk in chunks)
    # all rows stopped: nothing more is sampled
    chunks = list(generate_stream(model, PROMPTS, 4, seed=1, stop=lambda row, new: True))
    assert sum(int(chunk.sampled.sum()) for chunk in chunks) == 3
    assert sum(chunk.tokens.shape[1] for chunk in chunks) == 6


def test_no_new_tokens_still_routes_the_prompts(model: Decoder) -> None:
    chunks = list(generate_stream(model, PROMPTS, 0, with_experts=True))
    assert torch.cat([chunk.tokens for chunk in chunks], dim=1)[1].tolist() == PROMPTS[1]
    assert torch.cat([chunk.experts for chunk in chunks], dim=1).shape[1] == 5


def test_an_abandoned_stream_puts_the_mode_back(model: Decoder) -> None:
    model.train()
    stream = generate_stream(model, PROMPTS, 4)
    next(stream)
    assert not model.training
    stream.close()
    assert model.training


def test_with_experts_the_last_token_needs_a_place_too(model: Decoder) -> None:
    list(generate_stream(model, [[1, 2, 3]], 8))
    with pytest.raises(UserError, match=r"at most max_sequence_length = 10"):
        list(generate_stream(model, [[1, 2, 3]], 8, with_experts=True))
    with pytest.raises(UserError, match="prompt of 0 tokens"):
        list(generate_stream(model, [[1], []], 2))
    with pytest.raises(UserError, match="no prompt"):
        list(generate_stream(model, [], 2))
