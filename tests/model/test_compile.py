"""torch.compile of the blocks: the same numbers, one graph per kind of block and phase, none for a number of pairs."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from lightning_moe.model import Decoder, DecoderConfig, generate, next_token_loss
from lightning_moe.model.compilation import why_not_compiled
from lightning_moe.module import LanguageModel
from lightning_moe.routing import (
    ExpertChoice,
    ExpertThreshold,
    Phase,
    QuantileBalancing,
    RoutingRule,
    TokenChoice,
    TokenChoiceAuxLoss,
)

CONFIG = {
    "hidden_size": 32,
    "num_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_sequence_length": 32,
    "num_experts": 8,
}


def pair_of_decoders(
    rule: RoutingRule | None, compilation: dict[str, Any] | None = None, **options: object
) -> tuple[Decoder, Decoder]:
    """An eager decoder and its compiled copy, with no weight at zero."""
    eager = Decoder(DecoderConfig(**{**CONFIG, **options}), rule)
    for parameter in eager.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    compiled = copy.deepcopy(eager)
    compiled.compile_blocks(**compilation or {})
    torch.compiler.reset()
    counters.clear()
    return eager, compiled


def set_phase(decoder: Decoder, phase: Phase) -> None:
    for layer in decoder.moe_layers():
        layer.train_phase = phase


def loss_and_gradients(decoder: Decoder, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    decoder.zero_grad()
    output = decoder(ids)
    loss = next_token_loss(output.logits, ids).mean()
    (loss if output.aux_loss is None else loss + output.aux_loss).backward()
    return loss.detach(), [parameter.grad for parameter in decoder.parameters()]


def assert_same_training(eager: Decoder, compiled: Decoder, steps: int) -> set[int]:
    """Losses, gradients and masks; returns the numbers of chosen pairs that occurred."""
    sizes = set()
    for _ in range(steps):
        ids = torch.randint(0, 64, (4, 32))
        loss, gradients = loss_and_gradients(eager, ids)
        compiled_loss, compiled_gradients = loss_and_gradients(compiled, ids)
        torch.testing.assert_close(compiled_loss, loss, rtol=0, atol=1e-5)
        for gradient, compiled_gradient in zip(gradients, compiled_gradients, strict=True):
            torch.testing.assert_close(compiled_gradient, gradient, rtol=1e-4, atol=1e-6)
        for layer, compiled_layer in zip(eager.moe_layers(), compiled.moe_layers(), strict=True):
            assert torch.equal(layer.record.selection.mask, compiled_layer.record.selection.mask)
            sizes.add(int(layer.record.selection.mask.sum()))
    return sizes


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_compiled_is_eager_in_every_phase_without_a_break_or_a_graph_for_each_size(activation: str) -> None:
    eager, compiled = pair_of_decoders(ExpertThreshold(capacity_factor=None), activation=activation)
    graphs = []
    for phase in (Phase.WARMUP, Phase.TRAIN):
        for decoder in (eager, compiled):
            set_phase(decoder, phase)
        sizes = assert_same_training(eager, compiled, steps=5)
        assert len(sizes) >= (1 if phase is Phase.WARMUP else 5)  # other numbers of pairs in nearly every step
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [2, 3]  # the dense block and the MoE block; then the MoE block of the other phase
    for decoder in (eager, compiled):
        decoder.eval()
    ids = torch.randint(0, 64, (4, 32))
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, eager(ids).logits, rtol=0, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 5  # both once more, without gradients
    prompt = ids[:1, :4]
    assert torch.equal(generate(compiled, prompt, 8, temperature=0), generate(eager, prompt, 8, temperature=0))
    assert counters["stats"]["unique_graphs"] == 5
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [ExpertThreshold(), TokenChoiceAuxLoss(aux_loss_coef=0.1), QuantileBalancing()],
    ids=lambda r: type(r).__name__,
)
def test_compiled_rules_with_recomputation(rule: RoutingRule) -> None:
    eager, compiled = pair_of_decoders(rule, activation_checkpointing=True, router_z_loss_coef=0.001)
    assert_same_training(eager, compiled, steps=3)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.filterwarnings("ignore:MoELayer")  # no callback updates the routing state here
@pytest.mark.parametrize(
    ("rule", "graphs"),
    [
        (None, (1, 2, 2)),
        (TokenChoice(), (2, 4, 4)),  # the dense block and the MoE block; both in evaluation
        (QuantileBalancing(), (2, 4, 4)),
        (ExpertThreshold(), (2, 4, 5)),  # the MoE block after the warm-up
        (ExpertChoice(), (2, 4, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_phase_compiles_at_its_start_only(rule: RoutingRule | None, graphs: tuple[int, ...]) -> None:
    """Warm-up, validation with smaller last batches, training, validation, training; static sizes in training."""
    eager, compiled = pair_of_decoders(rule, {"backend": "aot_eager"})

    def train(steps: int) -> int:
        if rule is None:
            for _ in range(steps):
                loss_and_gradients(compiled, torch.randint(0, 64, (4, 32)))
        else:
            assert_same_training(eager, compiled, steps)
        return counters["stats"]["unique_graphs"]

    def validate() -> int:
        for decoder in (eager, compiled):
            decoder.eval()
        with torch.inference_mode():
            for sequences in (6, 6, 3, 5):
                ids = torch.randint(0, 64, (sequences, 32))
                torch.testing.assert_close(compiled(ids).logits, eager(ids).logits, rtol=0, atol=1e-5)
        for decoder in (eager, compiled):
            decoder.train()
        return counters["stats"]["unique_graphs"]

    for decoder in (eager, compiled):
        set_phase(decoder, Phase.WARMUP)
    assert [train(1), train(2)] == [graphs[0]] * 2
    assert [validate(), validate()] == [graphs[1]] * 2
    for decoder in (eager, compiled):
        set_phase(decoder, Phase.TRAIN)
    assert [train(1), train(2), validate(), train(1)] == [graphs[2]] * 4
    assert not counters["graph_break"]


def failing(*args: object, **kwargs: object) -> object:
    raise RuntimeError("no code for this\nand a second line")


@pytest.mark.parametrize(
    "backend",
    [failing, aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=failing)],
    ids=["forward", "backward"],
)
def test_training_goes_on_uncompiled_if_the_compiler_fails(backend: Any) -> None:
    eager, compiled = pair_of_decoders(TokenChoice(), {"backend": backend, "or_eager": True})
    with pytest.warns(UserWarning, match=r"torch.compile failed, .*RuntimeError: no code for this \(--model") as warned:
        assert_same_training(eager, compiled, steps=2)
    assert len(warned) == 1
    assert not compiled.compiled
    _, compiled = pair_of_decoders(TokenChoice(), {"backend": backend})
    with pytest.raises(BackendCompilerFailed, match="no code for this"):
        loss_and_gradients(compiled, torch.randint(0, 64, (4, 32)))


def test_what_keeps_a_device_from_compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    cuda = torch.device("cuda")
    assert why_not_compiled(torch.device("cpu")) == "it pays on CUDA devices only"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert why_not_compiled(cuda) == "it needs compute capability 7.0 or more, and a card has 6.1"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why_not_compiled(cuda) == "it needs the package triton, which is not installed"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "it needs a C compiler" in str(why_not_compiled(cuda))
    monkeypatch.setenv("CC", "gcc")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert why_not_compiled(cuda) == f"it needs Python's headers: there is no Python.h in {tmp_path}"
    (tmp_path / "Python.h").touch()
    assert why_not_compiled(cuda) is None


def test_the_default_compiles_no_cpu_and_true_compiles_any_device(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        for compile, compiled, lines in (("auto", False, 0), (False, False, 0), (True, True, 1)):
            module = LanguageModel(DecoderConfig(**CONFIG), compile=compile)
            module.configure_model()
            module.configure_model()  # as Lightning does for each command
            assert module.decoder.compiled is compiled
            assert len([one for one in caplog.messages if one.startswith("Compiling the blocks;")]) == lines


def test_compilation_keeps_the_names_of_the_state() -> None:
    eager, compiled = pair_of_decoders(ExpertThreshold())
    assert list(compiled.state_dict()) == list(eager.state_dict())
