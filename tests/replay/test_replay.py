"""Routes of a generation: what is recorded, and what a pass with them computes, against slow references."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.model import Decoder, DecoderConfig, generate_stream, inference_num_experts_per_token, replay
from lightning_moe.model.precision import Precision, computing_in
from lightning_moe.replay import (
    Divergence,
    Routes,
    generate_routes,
    read_routes,
    score,
    weights_fingerprint,
    write_routes,
)
from lightning_moe.replay.report import format_score
from lightning_moe.routing import ExpertChoice, ExpertThreshold, RoutingRule, TokenChoice

PROMPTS = [[0, 3, 4, 5], [0], [0, 7]]
RULES = [(ExpertThreshold(), 1), (TokenChoice(), 2), (ExpertChoice(pool="sequence"), 1)]
EACH = pytest.mark.parametrize(("rule", "k"), RULES, ids=[type(rule).__name__ for rule, _ in RULES])


def make(rule: RoutingRule | None, k: int = 1, seed: int = 0, **sizes: int) -> Decoder:
    torch.manual_seed(seed)
    shape = {"vocab_size": 20, "max_sequence_length": 16, "hidden_size": 16, "num_layers": 3} | sizes
    config = DecoderConfig(**shape, num_attention_heads=2, num_experts=10, num_experts_per_token=k)
    model = Decoder(config, rule)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def stop_second(row: int, new: list[int]) -> bool:
    """The second row ends early, and goes on to be fed what means nothing."""
    return row == 1 and len(new) == 3


def recorded(model: Decoder, **options: object) -> Routes:
    return generate_routes(model, PROMPTS, 6, seed=1, stop=stop_second, **options)


@EACH
def test_a_generation_is_on_record(rule: RoutingRule, k: int) -> None:
    model = make(rule, k)
    routes = recorded(model)
    chunks = list(generate_stream(model, PROMPTS, 6, seed=1, stop=stop_second, with_experts=True))
    fed = torch.cat([chunk.tokens for chunk in chunks], dim=1)
    assert routes.prompt_lengths.tolist() == [4, 1, 2]
    assert routes.lengths.tolist() == [10, 4, 8]
    assert routes.made.layers == ["layer_01", "layer_02"]
    assert (routes.made.precision, routes.made.weights) == ("32-true", "")
    for row, length in enumerate(routes.lengths.tolist()):
        alone = routes.tokens[row, :length]
        assert torch.equal(alone, fed[row, :length])
        assert alone[: len(PROMPTS[row])].tolist() == PROMPTS[row]
        with torch.no_grad():
            logits = model(alone[None]).logits[0]
        masks = torch.stack([layer.record.selection.mask[0] for layer in model.moe_layers()], 1)
        assert torch.equal(routes.experts[row, :length], masks)
        expected = logits.log_softmax(-1)
        for position in range(length):
            of_token = float(expected[position - 1, alone[position]]) if position >= len(PROMPTS[row]) else 0.0
            assert float(routes.log_probs[row, position]) == pytest.approx(of_token, abs=1e-5)
        for padded in (routes.tokens, routes.log_probs, routes.experts):
            assert not padded[row, length:].any()


@EACH
def test_replay_has_no_flips_and_no_divergence_where_nothing_differs(rule: RoutingRule, k: int) -> None:
    model = make(rule, k).double()  # rounding neither flips a route nor moves a probability
    routes = recorded(model)
    for batch_size in (1, 3):
        found = score(model, routes, batch_size)
        assert (found.num_tokens, found.num_new_tokens) == (22, 15)
        assert found.free_flips.tokens == found.free_flips.pairs == [0, 0]
        assert found.free_flips.tokens_in_any_layer == 0
        assert found.free_to_replayed == 0
        for divergence in (found.free, found.replayed):  # the record has fp32
            assert divergence.largest < 1e-6
            assert 0 <= divergence.kl < 1e-12


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@EACH
def test_a_generation_in_bfloat16_is_replayed_in_float32(rule: RoutingRule, k: int, precision: Precision) -> None:
    model = make(rule, k)
    with computing_in(model, precision):
        routes = recorded(model)
    assert routes.made.precision == precision
    again = make(rule, k)
    found = score(again, routes, 2)
    assert found.free_flips.tokens_in_any_layer < 1
    assert 1e-8 < found.replayed.kl < 0.1
    for batch in [routes.batch()]:
        with replay(again, batch.experts), torch.no_grad():
            again(batch.input_ids)
        for layer, experts in zip(again.moe_layers(), batch.experts, strict=True):
            assert torch.equal(layer.record.selection.mask, experts)
            assert layer.record.logits.dtype == torch.float32


def test_flips_and_divergence_are_those_of_a_loop_over_tokens() -> None:
    """The scoring model has other weights, so many tokens take other experts."""
    routes, model = recorded(make(TokenChoice(), 2)), make(TokenChoice(), 2, seed=1)
    found = score(model, routes, 2)
    tokens: list[int] = [0, 0]
    pairs: list[list[int]] = [[0, 0], [0, 0]]  # differing, all of both
    any_layer, ratios, replayed_ratios, divergences = 0, [], [], []
    for row, length in enumerate(routes.lengths.tolist()):
        ids = routes.tokens[row : row + 1, :length]
        with torch.no_grad():
            free = model(ids).logits[0].double().log_softmax(-1)
        masks = [layer.record.selection.mask[0] for layer in model.moe_layers()]
        forced = [experts[row : row + 1, :length] for experts in routes.experts.unbind(2)]
        with replay(model, forced), torch.no_grad():
            as_recorded = model(ids).logits[0].double().log_softmax(-1)
        for position in range(length):
            other = []
            for layer in range(2):
                mine = set(masks[layer][position].nonzero()[:, 0].tolist())
                theirs = set(forced[layer][0, position].nonzero()[:, 0].tolist())
                other.append(mine != theirs)
                tokens[layer] += mine != theirs
                pairs[layer][0] += len(mine ^ theirs)
                pairs[layer][1] += len(mine) + len(theirs)
            any_layer += any(other)
            if position >= len(PROMPTS[row]):
                token, old = int(ids[0, position]), float(routes.log_probs[row, position])
                ratios.append(old - float(free[position - 1, token]))
                replayed_ratios.append(old - float(as_recorded[position - 1, token]))
                p, q = free[position - 1], as_recorded[position - 1]
                divergences.append(sum(float(a.exp() * (a - b)) for a, b in zip(p, q, strict=True)))
    assert found.free_flips.tokens == pytest.approx([count / 22 for count in tokens])
    assert found.free_flips.pairs == pytest.approx([differing / both for differing, both in pairs])
    assert found.free_flips.tokens_in_any_layer == pytest.approx(any_layer / 22)
    assert found.free_flips.tokens_in_any_layer > 0.3
    assert found.free_to_replayed == pytest.approx(sum(divergences) / 15, rel=1e-4)
    for divergence, values in ((found.free, ratios), (found.replayed, replayed_ratios)):
        assert divergence.log_ratio == pytest.approx(sum(values) / 15, rel=1e-4)
        assert divergence.kl == pytest.approx(sum(math.exp(-r) - 1 + r for r in values) / 15, rel=1e-4)
        assert divergence.largest == pytest.approx(max(map(abs, values)), rel=1e-4)


def test_the_estimates_are_those_of_the_divergence_of_two_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(8, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    exact = float((p.exp() * (p - q)).sum())
    drawn = torch.multinomial(p.exp(), 20_000, replacement=True, generator=generator)
    found = Divergence.of((p - q)[drawn])
    assert found.log_ratio_error is not None
    assert found.kl_error is not None
    assert abs(found.log_ratio - exact) < 4 * found.log_ratio_error
    assert abs(found.kl - exact) < 4 * found.kl_error
    one = Divergence.of(torch.tensor([0.5], dtype=torch.float64))
    assert (one.log_ratio_error, one.kl_error) == (None, None)


def gradients(model: Decoder, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=labels).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@EACH
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_pass_with_routes_trains_their_gates_and_experts(
    rule: RoutingRule, k: int, checkpointing: bool
) -> None:
    routes = recorded(make(rule, k))
    routes.experts[..., 3] = False  # nobody takes the fourth expert; all new tokens take the fifth
    routes.experts[..., 4] = routes.known[..., None]
    model = make(rule, k, seed=2, activation_checkpointing=checkpointing).train()
    batch = routes.batch()
    with replay(model, batch.experts):  # the backward pass too, because a recomputation routes again
        found = gradients(model, batch.input_ids, batch.labels)
    for layer, experts in zip(model.moe_layers(), batch.experts, strict=True):
        assert torch.equal(layer.record.selection.mask, experts)
        up = layer.experts.up.grad
        assert not up[3].any()
        assert up[4].any()
        assert layer.router.weight.grad[4].any()
        assert layer.replayed is None
    # the same by finite differences of the loss in one weight of a router, and of an expert
    model.double()
    for name, index in (("router.weight", (4, 2)), ("experts.up", (4, 2, 1)), ("experts.down", (4, 1, 2))):
        name = f"blocks.1.moe.{name}"
        weight = dict(model.named_parameters())[name]
        losses = []
        for step in (1e-3, -1e-3):
            with torch.no_grad(), replay(model, batch.experts):
                weight[index] += step
                losses.append(float(model(batch.input_ids, labels=batch.labels).token_loss.double().sum()))
                weight[index] -= step
        expected = (losses[0] - losses[1]) / 2e-3 / batch.labels.numel()
        assert float(found[name][index]) == pytest.approx(expected, rel=1e-2, abs=1e-6)


def test_labels_are_the_new_tokens() -> None:
    routes = recorded(make(TokenChoice(), 2))
    batch = routes.batch(1, 3)
    assert batch.input_ids.shape == (2, 8)
    assert batch.labels[0].tolist() == [*routes.tokens[1, 1:4].tolist(), *[-100] * 5]
    assert batch.labels[1].tolist() == [-100, *routes.tokens[2, 2:8].tolist(), -100]
    assert batch.known.sum(1).tolist() == [4, 8]
    assert [tuple(experts.shape) for experts in batch.experts] == [(2, 8, 10)] * 2


def test_the_file_holds_everything(tmp_path: Path) -> None:
    model = make(TokenChoice(), 2)
    with inference_num_experts_per_token(model, 3):
        routes = recorded(model, temperature=0.7, top_k=5, top_p=0.9)
    file = tmp_path / "routes.safetensors"
    write_routes(file, routes)
    again = read_routes(file)
    assert again.made == routes.made
    assert (again.made.temperature, again.made.top_k, again.made.top_p) == (0.7, 5, 0.9)
    for name in ("tokens", "prompt_lengths", "lengths", "experts", "log_probs"):
        assert torch.equal(getattr(again, name), getattr(routes, name))
    assert load_file(file)["experts"].shape == (3, 10, 2, 2)  # ten experts in two bytes
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, "its tensors are experts, lengths, log_probs, prompt_lengths, not"),
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, r"tokens have the shape \[3\]"),
        ({"lengths": torch.tensor([10, 4])}, r"lengths are torch.int64 \[2\]; must be torch.int64 \[3\]"),
        ({"lengths": torch.tensor([11, 4, 8])}, "no length from 1 to 10"),
        ({"prompt_lengths": torch.tensor([0, 1, 2])}, "no length from 1 to 10"),
        ({"prompt_lengths": torch.tensor([4, 5, 2])}, "no length from 1 to 10"),
        (
            {"experts": torch.zeros(3, 10, 2, 1, dtype=torch.uint8)},
            r"must be torch.uint8 \[3, 10, 2, 2\]",
        ),
        ({"log_probs": torch.full((3, 10), math.nan)}, "above 0, or no number"),
        ({"tokens": torch.full((3, 10), 20)}, "outside of the vocabulary of 20"),
    ],
)
def test_a_file_with_other_content_is_refused(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    good, file = tmp_path / "good.safetensors", tmp_path / "routes.safetensors"
    write_routes(good, recorded(make(TokenChoice(), 2)))
    from safetensors import safe_open

    with safe_open(good, "pt") as opened:
        header = opened.metadata()
    tensors = {name: value for name, value in (load_file(good) | change).items() if value is not None}
    save_file(tensors, file, header)
    with pytest.raises(UserError, match=message):
        read_routes(file)
    save_file(tensors, file)
    with pytest.raises(UserError, match="holds no routes"):
        read_routes(file)
    save_file(load_file(good), file, {"routes": '{"version": 2, "made": {}}'})
    with pytest.raises(UserError, match="version=2: must be 1"):
        read_routes(file)
    file.write_bytes(good.read_bytes()[:-9])
    with pytest.raises(UserError, match="not a whole file of routes"):
        read_routes(file)
    with pytest.raises(UserError, match="no such file"):
        read_routes(tmp_path / "gone")
    with pytest.raises(UserError, match="is a folder"):
        read_routes(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (make(None), "MoE layers: layer_01, layer_02; this model has none: it is dense"),
        (make(TokenChoice(), 2, num_layers=2), "MoE layers: layer_01, layer_02; this model has layer_01"),
        (make(TokenChoice(), 2, vocab_size=30), "vocabulary: 20; this model has 30"),
        (make(TokenChoice(), 2, max_sequence_length=9), "a row of 10 positions, but the model's context is 9"),
    ],
    ids=["dense", "layers", "vocabulary", "context"],
)
def test_another_model_is_refused(model: Decoder, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score(model, recorded(make(TokenChoice(), 2)))
    if message.endswith("dense"):
        with pytest.raises(UserError, match="no routes to record"):
            recorded(model)


def test_a_fingerprint_tells_weights_and_state_apart() -> None:
    model = make(ExpertThreshold())
    first = weights_fingerprint(model)
    assert first == weights_fingerprint(make(ExpertThreshold()))
    layer = next(model.moe_layers())
    with torch.no_grad():
        layer.state["threshold"][0] += 1e-3
    assert weights_fingerprint(model) != first
    assert weights_fingerprint(make(ExpertThreshold()).bfloat16()) not in (first, weights_fingerprint(model))


def test_a_layer_that_ignores_the_routes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(TokenChoice(), 2)
    routes = recorded(model)
    routes.experts[0, 0, 1] = ~routes.experts[0, 0, 1]
    layer = list(model.moe_layers())[1]
    choose = layer.choose

    def stubborn(logits: Tensor) -> object:
        layer.replayed = None
        return choose(logits)

    monkeypatch.setattr(layer, "choose", stubborn)
    with pytest.raises(RuntimeError, match="layer_02: took other experts"):
        score(model, routes)


def test_no_estimate_is_called_a_divergence_that_is_none() -> None:
    model = make(TokenChoice(), 2)
    sampled, cut = recorded(model), recorded(model, temperature=0.5, top_k=4)
    texts = [format_score(score(model, routes), routes.made, "32-true") for routes in (sampled, cut)]
    assert "KL(generation ‖ pass)" in texts[0]
    assert "KL(generation ‖ pass)" not in texts[1]
    assert "not drawn from the model's own distribution (temperature=0.5, top_k=4)" in texts[1]
    assert "22 tokens, 15 of them new, generated in 32-true, scored in 32-true" in texts[0]
