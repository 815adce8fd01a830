"""The decoder: causality, the key/value cache, rotary positions, initial weights, options; against slow forms."""

import math

import pytest
import torch
from helpers.routing_reference import RULES, name_of
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.model import Decoder, DecoderConfig, next_token_loss
from lightning_moe.model.layers import apply_rotary, rotary_tables
from lightning_moe.routing import ExpertThreshold, RoutingRule, TokenChoice

LENGTH, VOCABULARY = 12, 32


def make_config(**options: object) -> DecoderConfig:
    settings = {
        "vocab_size": VOCABULARY,
        "max_sequence_length": LENGTH,
        "hidden_size": 16,
        "num_layers": 3,
        "num_attention_heads": 4,
        "num_experts": 4,
        "expert_hidden_size": 8,
    }
    return DecoderConfig(**{**settings, **options})


def make_decoder(rule: RoutingRule | None, **options: object) -> Decoder:
    """With random weights everywhere (fresh ones hold zeros) and thresholds that let about half of the tokens pass."""
    model = Decoder(make_config(**options), rule)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for layer in model.moe_layers():
        if "threshold" in layer.state:
            layer.state["threshold"].normal_(std=0.3)
    return model.eval()


def random_tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length))


def masks_of(model: Decoder) -> list[Tensor]:
    return [layer.record.selection.mask for layer in model.moe_layers() if layer.record is not None]


@pytest.mark.parametrize("rule", [*RULES, None], ids=name_of)
@torch.no_grad()
def test_no_logit_depends_on_a_later_token_or_another_sequence(rule: RoutingRule | None) -> None:
    """In evaluation, under every rule. Not bit for bit: matrix kernels round by the number of rows they are given."""
    model, tokens = make_decoder(rule), random_tokens()
    logits = model(tokens).logits
    masks = masks_of(model)
    for cut in range(1, LENGTH):
        changed = tokens.clone()
        changed[0, cut:] = (changed[0, cut:] + 1) % VOCABULARY
        changed[1] = (changed[1] + 3) % VOCABULARY
        other = model(changed).logits
        torch.testing.assert_close(other[0, :cut], logits[0, :cut], rtol=0, atol=2e-5)
        for before, after in zip(masks, masks_of(model), strict=True):
            assert torch.equal(before[0, :cut], after[0, :cut])
        assert (other[0, cut] - logits[0, cut]).abs().max() > 1e-3  # the change itself is seen


@pytest.mark.parametrize("num_key_value_heads", [None, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("rule", [*RULES, None], ids=name_of)
@pytest.mark.parametrize("chunks", [[1] * LENGTH, [5, 1, 1, 4, 1]], ids=["one_by_one", "chunks"])
@torch.no_grad()
def test_decoding_with_the_cache_is_the_full_forward(
    rule: RoutingRule | None, num_key_value_heads: int | None, chunks: list[int]
) -> None:
    model, tokens = make_decoder(rule, num_key_value_heads=num_key_value_heads), random_tokens()
    logits = model(tokens).logits
    masks = masks_of(model)
    cache, start = model.new_cache(len(tokens)), 0
    for size in chunks:
        part = slice(start, start + size)
        torch.testing.assert_close(model(tokens[:, part], cache).logits, logits[:, part], rtol=0, atol=2e-5)
        for full, step in zip(masks, masks_of(model), strict=True):
            assert torch.equal(full[:, part], step)
        start += size
    with pytest.raises(UserError, match=rf"{LENGTH + 1} tokens.*max_sequence_length is {LENGTH}"):
        model(tokens[:, :1], cache)


@torch.no_grad()
def test_a_cache_has_room_for_what_it_was_made_for() -> None:
    model, tokens = make_decoder(ExpertThreshold()), random_tokens()
    cache = model.new_cache(len(tokens), 5)
    torch.testing.assert_close(model(tokens[:, :5], cache).logits, model(tokens).logits[:, :5], rtol=0, atol=2e-5)
    with pytest.raises(UserError, match="6 tokens of context: the cache was made for 5"):
        model(tokens[:, 5:6], cache)


def test_the_cache_is_used_with_gradients_and_checkpointing_on() -> None:
    model, tokens = make_decoder(ExpertThreshold(), activation_checkpointing=True), random_tokens()
    logits, cache = model(tokens).logits, model.new_cache(2)
    parts = [model(part, cache).logits.detach() for part in tokens.split(4, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), logits, rtol=0, atol=2e-5)


@torch.no_grad()
def test_grouped_heads_are_full_heads_with_shared_keys_and_values() -> None:
    """GQA with 2 key/value heads of 4 equals plain attention whose key and value rows are repeated."""
    grouped = make_decoder(None, num_key_value_heads=2)
    full = make_decoder(None)
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if name.endswith(("key.weight", "value.weight")):
            weights[name] = weight.view(2, 1, 4, 16).expand(2, 2, 4, 16).reshape(16, 16)
    full.load_state_dict(weights)
    tokens = random_tokens()
    torch.testing.assert_close(full(tokens).logits, grouped(tokens).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_attention_is_the_loop_over_positions_in_float64() -> None:
    model = make_decoder(None)
    attention, x = model.blocks[0].attention, torch.randn(1, 6, 16)
    rotary = rotary_tables(torch.arange(6), 4, 10000.0)
    rms = lambda v: v / (v.square().mean() + 1e-6).sqrt()  # noqa: E731
    rows = [[getattr(attention, name).weight.double() @ t for t in x[0].double()] for name in ("query", "key", "value")]
    out = torch.zeros(6, 16, dtype=torch.float64)
    for head in range(4):
        part = slice(4 * head, 4 * head + 4)
        turned = []
        for vectors in rows[:2]:
            turned.append([])
            for position, vector in enumerate(vectors):
                v = rms(vector[part])
                angle = position * torch.tensor([1.0, 10000.0 ** (-2 / 4)], dtype=torch.float64)
                pairs = torch.complex(v[:2], v[2:]) * torch.polar(torch.ones(2, dtype=torch.float64), angle)
                turned[-1].append(torch.cat([pairs.real, pairs.imag]))
        for s in range(6):
            scores = torch.stack([turned[0][s] @ turned[1][t] / math.sqrt(4) for t in range(s + 1)])
            out[s, part] = sum(p * rows[2][t][part] for t, p in enumerate(scores.softmax(0)))
    expected = out @ attention.output.weight.double().T
    torch.testing.assert_close(attention(x, rotary)[0].double(), expected, rtol=1e-4, atol=1e-5)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    query, key = torch.randn(2, 1, 1, 1, 8).double().float()

    def score(at: int, other: int) -> float:
        at_tables, other_tables = (rotary_tables(torch.tensor([p]), 8, 100.0) for p in (at, other))
        return float((apply_rotary(query, *at_tables) * apply_rotary(key, *other_tables)).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-2)
    norm = apply_rotary(query, *rotary_tables(torch.tensor([31]), 8, 100.0)).norm().item()
    assert norm == pytest.approx(query.norm().item(), rel=1e-6)


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_initial_weights_are_the_papers(activation: str) -> None:
    config = DecoderConfig(
        vocab_size=512, hidden_size=256, num_layers=2, num_key_value_heads=1, num_attention_heads=4,
        num_experts=8, expert_hidden_size=128, activation=activation,
    )  # fmt: skip
    model = Decoder(config, ExpertThreshold())
    moe = next(model.moe_layers())

    def assert_normal(weight: Tensor, std: float) -> None:
        count = weight.numel()
        assert weight.mean().abs() < 5 * std / math.sqrt(count)  # five standard errors
        assert abs(weight.std().item() / std - 1) < 5 / math.sqrt(2 * count)
        assert weight.abs().max() > 3 * std  # not uniform

    for matrix, d_in, d_out in [
        (model.blocks[0].attention.query.weight, 256, 256),
        (model.blocks[0].attention.key.weight, 256, 64),  # narrower outputs: smaller by sqrt(d_out / d_in)
        (model.blocks[0].attention.value.weight, 256, 64),
        (model.blocks[0].feed_forward.up.weight, 256, 256),
        (moe.shared_expert.up.weight, 256, 128),
        (moe.experts.up[3], 256, 128),
    ]:
        assert_normal(matrix, d_in**-0.5 * min(1.0, math.sqrt(d_out / d_in)))
    if activation == "swiglu":
        assert_normal(moe.experts.gate[0], 256**-0.5 * math.sqrt(0.5))
        assert_normal(moe.shared_expert.gate.weight, 256**-0.5 * math.sqrt(0.5))
    assert_normal(moe.router.weight, 256**-0.5)
    assert_normal(model.embedding.weight, 1.0)
    zeros = [
        model.head.weight,
        moe.experts.down,
        moe.shared_expert.down.weight,
        model.blocks[0].feed_forward.down.weight,
    ]
    for matrix in [*zeros, *(block.attention.output.weight for block in model.blocks)]:
        assert not matrix.any()
    assert not torch.equal(moe.experts.up[0], moe.experts.up[1])


def test_all_rules_start_from_the_same_weights() -> None:
    """Only the rule differs between two experiments of one seed."""
    weights = []
    for rule in RULES:
        torch.manual_seed(3)
        weights.append(dict(Decoder(make_config(), rule).named_parameters()))
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        assert all(torch.equal(other[name], weights[0][name]) for name in other)


@pytest.mark.parametrize("router", ["linear", "cosine"])
def test_fresh_router_logits_have_unit_variance(router: str) -> None:
    model = Decoder(make_config(hidden_size=256, num_experts=16, router=router), TokenChoice())
    model(random_tokens(8))
    for layer in model.moe_layers():
        assert layer.record.logits.std().item() == pytest.approx(1.0, rel=0.15)


def test_tied_embeddings_share_one_matrix_also_after_construction_on_meta() -> None:
    model = make_decoder(None, tie_embeddings=True)
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())
    tokens = random_tokens()
    next_token_loss(model(tokens).logits, tokens).sum().backward()
    assert model.embedding.weight.grad.any()
    with torch.device("meta"):
        later = Decoder(make_config(tie_embeddings=True), ExpertThreshold())
    later = later.to_empty(device="cpu")
    later.reset_parameters()
    assert later.head.weight is later.embedding.weight
    assert later(tokens).logits.isfinite().all()


def test_a_model_from_the_meta_device_is_the_directly_built_one() -> None:
    direct = Decoder(make_config(), ExpertThreshold())
    torch.manual_seed(5)
    direct.reset_parameters()
    with torch.device("meta"):
        later = Decoder(make_config(), ExpertThreshold())
    later = later.to_empty(device="cpu")
    torch.manual_seed(5)
    later.reset_parameters()
    for name, tensor in direct.state_dict().items():
        assert torch.equal(later.state_dict()[name], tensor), name


@torch.no_grad()
def test_soft_cap_bounds_the_logits_in_fp32() -> None:
    capped, free = make_decoder(None, logit_softcap=2.0), make_decoder(None, logit_softcap=None)
    free.load_state_dict(capped.state_dict())
    tokens = random_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        assert capped(tokens).logits.dtype == torch.float32
    raw, logits = free(tokens).logits.double(), capped(tokens).logits
    assert raw.abs().max() > 2.0
    torch.testing.assert_close(logits.double(), 2.0 * torch.tanh(raw / 2.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_activation_checkpointing_changes_nothing(rule: RoutingRule) -> None:
    """Logits, auxiliary loss, gradients and records bit for bit: the recomputation routes as the first pass did."""
    results = []
    for activation_checkpointing in (False, True):
        torch.manual_seed(1)
        model = make_decoder(rule, activation_checkpointing=activation_checkpointing).train()
        tokens = random_tokens()
        output = model(tokens)
        first_pass = masks_of(model)
        loss = next_token_loss(output.logits, tokens.roll(-1)).mean() + (output.aux_loss or 0)
        loss.backward()
        assert all(torch.equal(a, b) for a, b in zip(first_pass, masks_of(model), strict=True))
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((loss.detach(), gradients, first_pass))
    (loss, gradients, masks), (other_loss, other_gradients, other_masks) = results
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)
    assert all(torch.equal(a, b) for a, b in zip(masks, other_masks, strict=True))


def test_dense_layers_come_first() -> None:
    model = make_decoder(ExpertThreshold(), num_layers=4, num_dense_layers=2)
    assert [block.moe is None for block in model.blocks] == [True, True, False, False]
    assert all(block.moe is None for block in make_decoder(None).blocks)


def test_each_layer_can_have_its_own_rate() -> None:
    model = make_decoder(TokenChoice(), num_layers=4, num_experts_per_token=[1, 2, 3])
    model(random_tokens())
    assert [mask.sum(-1).unique().tolist() for mask in masks_of(model)] == [[1], [2], [3]]


def test_token_loss_is_the_negative_log_probability_in_float64() -> None:
    logits, labels = torch.randn(2, 5, 7) * 10, torch.randint(0, 7, (2, 5))
    labels[0, 3] = -100
    loss = next_token_loss(logits, labels)
    assert loss.dtype == torch.float32
    for b in range(2):
        for s in range(5):
            row, label = logits[b, s].double(), labels[b, s].item()
            expected = 0.0 if label == -100 else (row.exp().sum().log() - row[label]).item()
            assert loss[b, s].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
