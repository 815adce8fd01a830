"""The chunked loss against plain logits in float64: values, all gradients, memory, and whole training steps."""

import copy
from collections.abc import Callable

import pytest
import torch
from helpers.gloo_pair import GlooPair
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measurement import host_waits, peak_memory
from lightning_moe.model import Decoder, DecoderConfig, loss_head
from lightning_moe.model.loss_head import chunk_size, chunked_next_token_loss
from lightning_moe.routing import ExpertChoice

B, S, D, V = 3, 7, 8, 19
CPU = torch.device("cpu")
CHUNKS = [1, 4, 5, 21, 100]  # of 21 tokens


def example(ignored: str = "some", scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [B, S, D] and weight [V, D] in float64, labels [B, S]."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(B, S, D, generator=generator, dtype=torch.float64)
    weight = scale * torch.randn(V, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, (B, S), generator=generator)
    if ignored != "none":
        labels[torch.rand(B, S, generator=generator) < (0.3 if ignored == "some" else 2)] = -100
    return hidden, weight, labels


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Token losses [B, S], and the gradients of their sum by hand, one position after another; float64."""
    losses, of_hidden, of_weight = torch.zeros(B, S).double(), torch.zeros_like(hidden), torch.zeros_like(weight)
    for b in range(B):
        for s in range(S):
            label = int(labels[b, s])
            if label == -100:
                continue
            raw = weight @ hidden[b, s]
            capped = raw if softcap is None else softcap * torch.tanh(raw / softcap)
            losses[b, s] = torch.logsumexp(capped, 0) - capped[label]
            slope = torch.exp(capped - torch.logsumexp(capped, 0))
            slope[label] -= 1
            if softcap is not None:
                slope = slope / torch.cosh(raw / softcap) ** 2
            of_hidden[b, s] = weight.T @ slope
            of_weight += torch.outer(slope, hidden[b, s])
    return losses, of_hidden, of_weight


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found.double() - expected.double()).abs().max() / expected.abs().max().clamp(min=1e-12))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float64, False, 1e-6),  # the soft cap is fp32
        (torch.float32, False, 1e-5),
        (torch.float32, True, 0.03),
        (torch.bfloat16, False, 0.03),
    ],
    ids=["fp64", "fp32", "autocast", "bf16"],
)
def test_value_and_gradients_are_those_of_float64(
    dtype: torch.dtype, autocast: bool, tolerance: float, ignored: str, softcap: float | None, chunk: int
) -> None:
    hidden, weight, labels = example(ignored)
    hidden, weight = hidden.to(dtype).double(), weight.to(dtype).double()  # the rounding of the input does not count
    losses, of_hidden, of_weight = reference(hidden, weight, labels, softcap)
    leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, token_loss = chunked_next_token_loss(*leaves, labels, softcap, chunk)
    (total * 0.25).backward()
    assert total.dtype == token_loss.dtype == torch.float32
    assert not token_loss.requires_grad
    assert [leaf.grad.dtype for leaf in leaves] == [dtype, dtype]
    assert difference(token_loss, losses) < tolerance
    assert float(total.detach()) == pytest.approx(float(losses.sum()), rel=tolerance)
    assert difference(leaves[0].grad, of_hidden / 4) < tolerance
    assert difference(leaves[1].grad, of_weight / 4) < tolerance
    assert not token_loss[labels == -100].any()
    assert not leaves[0].grad[labels == -100].any()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(chunked_next_token_loss(*leaves, labels, softcap, chunk)[1], token_loss)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_the_best_tokens_are_those_of_all_logits(softcap: float | None, chunk: int) -> None:
    hidden, weight, labels = (tensor.float() if tensor.is_floating_point() else tensor for tensor in example("some"))
    predicted = torch.full_like(labels, -7)
    chunked_next_token_loss(hidden, weight, labels, softcap, chunk, predicted)
    assert torch.equal(predicted, torch.where(labels == -100, -7, (hidden @ weight.T).argmax(-1)))


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_large_logits_keep_their_losses(softcap: float | None) -> None:
    """exp(1000) is no fp32 number, and the label's probability may be below the smallest one."""
    hidden, weight, labels = example(scale=300.0)
    losses = reference(hidden, weight, labels, softcap)[0]
    found = chunked_next_token_loss(hidden.float(), weight.float(), labels, softcap, 4)[1]
    assert losses.max() > (1000 if softcap is None else 50)
    assert difference(found, losses) < 1e-5


def test_what_an_ignored_position_holds_reaches_nothing() -> None:
    results = []
    for value in (1.0, float("nan"), float("inf")):
        hidden, weight, labels = example()
        hidden[labels == -100] = value
        leaves = [t.float().requires_grad_() for t in (hidden, weight)]
        total, token_loss = chunked_next_token_loss(*leaves, labels, 4.0, 5)
        total.backward()
        results.append([total.detach(), token_loss, leaves[0].grad, leaves[1].grad])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_the_gradients_that_are_wanted(needs: tuple[bool, bool]) -> None:
    hidden, weight, labels = example()
    expected = reference(hidden, weight, labels, 4.0)[1:]
    leaves = [t.requires_grad_(need) for t, need in zip((hidden, weight), needs, strict=True)]
    chunked_next_token_loss(*leaves, labels, 4.0, 4)[0].backward()
    for leaf, gradient, need in zip(leaves, expected, needs, strict=True):
        assert (leaf.grad is not None) == need
        assert leaf.grad is None or difference(leaf.grad, gradient) < 1e-6


def test_the_sum_over_chunks_is_in_fp32_when_the_weight_is_not() -> None:
    """800 equal positions, one per chunk: in bf16 a sum stops growing where half a unit of its last place is added."""
    hidden, weight = torch.ones(1, 800, 2, dtype=torch.bfloat16), torch.zeros(2, 2, dtype=torch.bfloat16)
    weight.requires_grad_()
    labels = torch.zeros(1, 800, dtype=torch.int64)
    chunked_next_token_loss(hidden, weight, labels, None, 1)[0].backward()
    assert torch.equal(weight.grad, torch.tensor([[-400.0, -400.0], [400.0, 400.0]], dtype=torch.bfloat16))


def test_gradients_add_up_over_micro_batches_of_unequal_counts() -> None:
    hidden, weight, labels = example("none")
    labels[0], labels[1, 3:] = -100, -100
    whole, parts = (weight.clone().requires_grad_() for _ in range(2))
    chunked_next_token_loss(hidden, whole, labels, 4.0, 4)[0].backward()
    for row in range(B):
        chunked_next_token_loss(hidden[row : row + 1], parts, labels[row : row + 1], 4.0, 3)[0].backward()
    assert difference(parts.grad, whole.grad) < 1e-6


def test_a_second_backward_pass_is_refused() -> None:
    """The first one changes what was saved: a wrong gradient would follow."""
    hidden, weight, labels = example()
    total, _ = chunked_next_token_loss(hidden.requires_grad_(), weight.requires_grad_(), labels, 4.0)
    (0.5 * total).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (0.5 * total).backward()


def test_labels_of_another_shape_are_refused() -> None:
    hidden, weight, labels = example()
    with pytest.raises(ValueError, match=r"labels of shape \[3, 6\] for hidden states of \[3, 7, 8\]"):
        chunked_next_token_loss(hidden, weight, labels[:, 1:], 4.0)


def test_chunks_are_equal_and_within_their_bytes() -> None:
    assert chunk_size(16384, 65536) == 1024
    assert chunk_size(1025, 65536) == 513  # not 1,024 and one
    assert chunk_size(4096, 4096) == 4096
    assert chunk_size(0, 4096) == chunk_size(5, 2**40) == 1


def test_the_host_never_waits() -> None:
    hidden, weight, labels = example()
    hidden.requires_grad_()

    def run() -> None:
        chunked_next_token_loss(hidden, weight, labels, 4.0, 5)[0].backward()

    run()
    assert host_waits(run, CPU) == 0


# --- memory


def peak_of_head(num_tokens: int, dtype: torch.dtype) -> int:
    """Bytes above hidden states and weight of one forward and backward pass."""
    vocabulary, width = 4096, 16
    hidden = torch.randn(1, num_tokens, width, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, dtype=dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (1, num_tokens))

    def run() -> None:
        chunked_next_token_loss(hidden, weight, labels, 15.0)[0].backward()

    run()  # lasting allocations of a first call
    hidden.grad = weight.grad = None
    return peak_memory(run, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_two_buffers_of_a_chunk_however_many_tokens(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Beside them are the gradients: [N, 16] of hidden states, which grows, and [4096, 16] of the weight."""
    chunk = 64 * 4096 * 4
    monkeypatch.setattr(loss_head, "CHUNK_BYTES", chunk)
    peaks = [peak_of_head(num_tokens, dtype) for num_tokens in (256, 2048)]
    of_weight, of_token = 4096 * 16 * 4, 16 * dtype.itemsize + 4 + 1  # gradient, loss, whether it counts
    assert 2 * chunk < peaks[0] < 2 * chunk + 1.5 * of_weight + 256 * of_token + 20_000
    assert peaks[1] - peaks[0] == pytest.approx((2048 - 256) * of_token, abs=2000)


# --- the decoder


def decoder(**options: object) -> Decoder:
    """Four layers of experts; no weight at zero."""
    sizes = {"vocab_size": 40, "max_sequence_length": 16, "hidden_size": 16, "num_layers": 3}
    sizes |= {"num_attention_heads": 2, "num_experts": 4}
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(**{**sizes, **options}), ExpertChoice(pool="sequence"))
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return model


def texts(micro_batches: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and labels [4, 16]; other numbers of labels count in each."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for index in range(micro_batches):
        ids = torch.randint(0, 40, (4, 17), generator=generator)
        labels = ids[:, 1:].clone()
        labels[:, 16 - 3 * index :] = -100
        found.append((ids[:, :-1].contiguous(), labels))
    return found


def plain_loss(model: Decoder, ids: Tensor, labels: Tensor) -> Tensor:
    """By the logits: the mean over all positions, of which ignored ones add nothing."""
    log_probability = model(ids).logits.double().log_softmax(-1)
    taken = log_probability.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -(taken * (labels != -100)).sum() / labels.numel()


def gradients_of(
    model: Decoder, loss: Callable[..., Tensor], autocast: bool = False
) -> tuple[list[float], list[Tensor]]:
    """Losses of two micro-batches, and the sum of their gradients."""
    model.zero_grad()
    values = []
    for ids, labels in texts(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(model, ids, labels)
        values.append(value.item())
        value.backward()
    return values, [parameter.grad.clone() for parameter in model.parameters()]


def chunked_loss(model: Decoder, ids: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = model(ids, labels=labels).loss
    return loss


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven or so tokens per chunk."""
    monkeypatch.setattr(loss_head, "CHUNK_BYTES", 7 * 40 * 4)


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_embeddings": True}, {"activation_checkpointing": True}, {"logit_softcap": None}],
    ids=["plain", "tied", "checkpointing", "no soft cap"],
)
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-5), (True, 0.02)], ids=["fp32", "autocast"])
@pytest.mark.usefixtures("small_chunks")
def test_a_decoder_with_labels_trains_as_its_logits_do(
    options: dict[str, object], autocast: bool, tolerance: float
) -> None:
    model = decoder(**options)
    values, gradients = gradients_of(model, chunked_loss, autocast)
    expected_values, expected = gradients_of(model, plain_loss, autocast)
    assert values == pytest.approx(expected_values, rel=tolerance / 10)
    for (name, _), found, wanted in zip(model.named_parameters(), gradients, expected, strict=True):
        assert difference(found, wanted) < tolerance, name


@pytest.mark.slow
@pytest.mark.usefixtures("small_chunks")
def test_with_compiled_blocks() -> None:
    eager = decoder()
    compiled = copy.deepcopy(eager)
    compiled.compile_blocks()
    values, gradients = gradients_of(compiled, chunked_loss)
    expected_values, expected = gradients_of(eager, plain_loss)
    assert values == pytest.approx(expected_values, rel=1e-5)
    assert all(difference(found, wanted) < 1e-4 for found, wanted in zip(gradients, expected, strict=True))


@pytest.mark.usefixtures("small_chunks")
def test_thirty_steps_are_those_of_whole_logits() -> None:
    curves = []
    for loss in (chunked_loss, plain_loss):
        model = decoder()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        [(ids, labels)] = texts(1)
        curve = []
        for _ in range(30):
            optimizer.zero_grad()
            value = loss(model, ids, labels)
            value.backward()
            optimizer.step()
            curve.append(value.item())
        curves.append(curve)
    assert curves[0][-1] < curves[0][0] - 0.5
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


def gradients_on_rank(rank: int, strategy: str, tie_embeddings: bool) -> list[Tensor]:
    """Mean over the ranks, each of which has two sequences of each micro-batch."""
    loss_head.CHUNK_BYTES = 7 * 40 * 4
    model = decoder(tie_embeddings=tie_embeddings)
    wrapped: nn.Module = model
    if strategy == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    for ids, labels in texts(2):
        rows = slice(2 * rank, 2 * rank + 2)
        wrapped(ids[rows], labels=labels[rows]).loss.backward()
    grads = [parameter.grad for parameter in model.parameters()]
    assert isinstance(model, FSDPModule) == (strategy == "fsdp")
    return [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]


@pytest.mark.parametrize("tie_embeddings", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradients_over_two_processes(gloo_pair: GlooPair, strategy: str, tie_embeddings: bool) -> None:
    first, second = gloo_pair.run(gradients_on_rank, [(rank, strategy, tie_embeddings) for rank in (0, 1)])
    model = decoder(tie_embeddings=tie_embeddings)
    expected = gradients_of(model, plain_loss)[1]
    for (name, _), found, other, wanted in zip(model.named_parameters(), first, second, expected, strict=True):
        assert torch.equal(found, other), name
        assert difference(found, wanted) < 1e-5, name
