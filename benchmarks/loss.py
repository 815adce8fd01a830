"""The head and the loss: in chunks of tokens, against all logits at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.alternatives import loss_of_whole_logits
from benchmarks.measurement import peak_memory, require_close
from benchmarks.setup import Row, Setup, counted, layer_input, timed
from lightning_moe.model.loss_head import chunked_next_token_loss

LossFunction = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]


def loss(setup: Setup) -> Iterator[Row]:
    """Time head, soft cap and cross-entropy, forward and backward, and measure their memory."""
    cases = {name: run for name, (run, _) in _cases(setup).items()}
    yield from timed("head and loss, forward + backward", loss_size(setup), cases, setup)
    yield from loss_memory(setup)


def loss_memory(setup: Setup) -> Iterator[Row]:
    """Measure the peak of head and loss above weight and input, with their gradients."""
    peaks = []
    for name, (run, forget) in _cases(setup).items():
        run()
        forget()
        peaks.append((name, peak_memory(run, setup.device)))
        forget()
    yield from counted("peak memory, head and loss", loss_size(setup), peaks, "bytes")


def loss_size(setup: Setup) -> str:
    """Return the sizes that matter, as text."""
    return f"d={setup.hidden_size}, {setup.num_tokens} tokens, vocabulary {setup.vocab_size}"


def _cases(setup: Setup) -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
    """Return each way's forward and backward pass, and what frees its gradients, after a check that they agree."""
    hidden, labels, softcap = layer_input(setup), setup.tokens(*setup.batch_shape), setup.config().logit_softcap
    weight = torch.randn(setup.vocab_size, setup.hidden_size, device=setup.device, dtype=setup.dtype)
    weight = weight.mul_(setup.hidden_size**-0.5).requires_grad_()
    ways: dict[str, LossFunction] = {
        "whole logits": loss_of_whole_logits,
        "chunks": lambda *arguments: chunked_next_token_loss(*arguments)[0],
    }

    def forget() -> None:
        hidden.grad = weight.grad = None

    def run(way: LossFunction) -> None:
        forget()
        with setup.autocast():
            value = way(hidden, weight, labels, softcap) / labels.numel()
        value.backward()  # type: ignore[no-untyped-call]

    gradients = []
    for way in ways.values():
        run(way)
        gradients.append((hidden.grad, weight.grad))
    forget()
    for expected, found in zip(*gradients, strict=True):
        assert expected is not None
        assert found is not None
        require_close(found, expected, setup.precision, "head and loss in chunks")
    return {name: (lambda way=way: run(way), forget) for name, way in ways.items()}  # type: ignore[misc]
