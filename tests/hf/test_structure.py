"""What is read of every family's routers is what these compute; what is not understood is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.errors import UserError
from lightning_moe.hf import ReleasedTopK, TransformersLM
from lightning_moe.hf.gating import Gating
from tests.helpers.hf_models import CHOSEN, CONTEXT, DENSE, EXPERTS, FAMILIES, OTHER_FAMILIES, make_model
from tests.helpers.hf_tokenizers import VOCABULARY

DTYPES = (torch.float32, torch.bfloat16)


def ids(seed: int = 0, shape: tuple[int, int] = (3, 40)) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def watched(model: PreTrainedModel, paths: list[str]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Logits, weights and indices that routers return, read by hooks of this test."""
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def hook(path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
            found[path] = output

        return keep

    for path in paths:
        model.get_submodule(path).register_forward_hook(hook(path))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_reading_is_what_the_router_computes_and_the_model_stays_as_it_was(family: str, dtype: torch.dtype) -> None:
    model = make_model(family, dtype=dtype)
    with torch.no_grad():
        expected = model(input_ids=ids()).logits
    lm = TransformersLM(model, family)
    found = watched(model, [layer.path for layer in lm.layers])
    with torch.no_grad():
        logits = lm(ids()).logits
    assert torch.equal(logits, expected.float())
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    for layer in lm.layers:
        router_logits, weights, indices = found[layer.path]
        mask = torch.zeros(3, 40, EXPERTS, dtype=torch.bool)
        gates = torch.zeros(3, 40, EXPERTS)
        for token in range(120):  # one after the other
            row, position = divmod(token, 40)
            mask[row, position, indices[token]] = True
            gates[row, position, indices[token].long()] = weights[token].float()
        assert layer.record is not None
        assert torch.equal(layer.record.selection.mask, mask)
        assert torch.equal(layer.record.logits.flatten(0, 1), router_logits.float())
        assert layer.state.num_experts_per_token == CHOSEN
        read = torch.where(mask, layer.gates(layer.record.logits, mask), 0.0)
        torch.testing.assert_close(read, gates, **tolerance)
        if dtype is torch.float32:  # in bf16 scores are equal
            assert torch.equal(layer.rule.select(layer.record.logits, layer.state, layer.phase).mask, mask)


def test_groups_and_biases_are_found() -> None:
    layer = TransformersLM(make_model("deepseek_v3")).layers[0]
    assert layer.rule == ReleasedTopK("sigmoid", 2, 1, "top2")
    assert layer.gating == Gating("sigmoid", True, 1.5)
    assert bool(layer.state["selection_bias"].any())
    assert TransformersLM(make_model("deepseek_v2_groups")).layers[0].rule == ReleasedTopK("softmax", 4, 2, "max")
    assert TransformersLM(make_model("deepseek_v2")).layers[0].rule == ReleasedTopK("softmax")
    assert TransformersLM(make_model("phimoe")).layers[0].gating.score == "sparsemixer"


def test_a_planted_bias_a_planted_scale_and_a_planted_expert_are_seen() -> None:
    model = make_model("glm4_moe")
    router = next(module for name, module in model.named_modules() if name.endswith("mlp.gate"))
    with torch.no_grad():
        router.e_score_correction_bias[3] += 100.0
        router.routed_scaling_factor = 2.75
    lm = TransformersLM(model)
    with torch.no_grad():
        lm(ids())
    first, second = lm.layers
    assert first.record is not None
    assert second.record is not None
    assert bool(first.record.selection.mask[..., 3].all())
    assert not bool(second.record.selection.mask[..., 3].all())
    assert first.gating.scale == 2.75
    assert second.gating.scale == 1.5
    assert torch.equal(first.state["selection_bias"], router.e_score_correction_bias)


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_another_structure_is_refused_with_what_was_found(family: str) -> None:
    with pytest.raises(UserError, match=r"structure of \w+ is not known\. Found: .*(Router|Gating).*Wanted: a router"):
        TransformersLM(make_model(family), family)


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"--model small: Qwen3ForCausalLM is a dense model: it has no routers\."):
        TransformersLM(make_model(DENSE), "small")


def changed(model: PreTrainedModel, change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]) -> PreTrainedModel:
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            forward = module.forward
            module.forward = lambda x, forward=forward: change(*forward(x))
    return model


def test_another_choice_or_other_weights_are_refused() -> None:
    model = changed(make_model("olmoe"), lambda logits, weights, indices: (logits, weights, (indices + 1) % EXPERTS))
    with pytest.raises(
        UserError, match=r"layers\.0\.mlp\.gate \(OlmoeTopKRouter\): its choice of experts is not known"
    ):
        TransformersLM(model)
    model = changed(make_model("olmoe"), lambda logits, weights, indices: (logits, weights.square(), indices))
    with pytest.raises(UserError, match="its weighting of the experts is not known"):
        TransformersLM(model)


def test_experts_that_are_not_a_weighted_sum_are_refused() -> None:
    model = make_model("olmoe")
    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            forward = module.forward
            module.forward = lambda x, i, w, forward=forward: forward(x, i, w).square()
    with pytest.raises(UserError, match="do not compute a weighted sum of their experts"):
        TransformersLM(model)


def test_a_long_context_is_bounded_and_refused_beyond() -> None:
    lm = TransformersLM(make_model("qwen3_moe"), max_sequence_length=16)
    assert lm.max_sequence_length == 16
    with pytest.raises(UserError, match="17 tokens of context: the model's context is 16"):
        lm(ids(shape=(1, 17)))
    assert TransformersLM(make_model("qwen3_moe"), max_sequence_length=10**6).max_sequence_length == CONTEXT
