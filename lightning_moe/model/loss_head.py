"""The next-token loss without all logits: head product, soft cap and cross-entropy, some tokens at a time.

Logits [N, V] are the largest tensor of a model with a large vocabulary, and autograd would keep several of them. So the
gradients of hidden states and head weight are computed in the forward pass, while a chunk's logits are there. The
backward pass only multiplies them with the gradient of the loss. So this must be one number for all tokens: the sum of
the losses has a gradient, and the losses of single tokens have none.

At any time there are at most two fp32 tensors of a chunk's logits.

Shape letters: N tokens, C tokens of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

#: label of positions that do not count
IGNORED = -100
#: bytes that a chunk's fp32 logits may take: 1,024 tokens of a vocabulary of 65,536 (docs/performance.md)
CHUNK_BYTES = 2**28


def chunk_size(num_tokens: int, vocab_size: int) -> int:
    """Return the number of tokens per chunk, at least 1: the fewest equal chunks of at most `CHUNK_BYTES`."""
    most = max(1, CHUNK_BYTES // (4 * vocab_size))
    num_chunks = max(1, -(-num_tokens // most))
    return max(1, -(-num_tokens // num_chunks))


def chunked_next_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    softcap: float | None,
    chunk: int | None = None,
    predicted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of ``softcap · tanh(hidden @ weightᵀ / softcap)`` without holding it.

    Products are in the dtype of autocast, or in that of ``hidden``. Soft cap and softmax are in fp32, as is the sum of
    the weight's gradient over the chunks. A position that is ignored has loss 0 and no gradient, whatever its hidden
    state is. The gradients cannot be differentiated again, and serve one backward pass.

    Args:
        hidden: normed hidden states [B, S, D].
        weight: weight of the head [V, D].
        labels: int64 [B, S], already shifted: ``labels[b, s]`` follows ``hidden[b, s]``; `IGNORED` does not count.
        softcap: bound of the logits; `None` for none.
        chunk: number of tokens per chunk; `None` means `chunk_size`.
        predicted: where to write the token with the highest logit, int64 [B, S], contiguous; positions that are ignored
            stay as they are. Only without gradients.

    Returns:
        total: sum of all losses in nats, fp32 [].
        token_loss: loss of each position, fp32 [B, S], without a gradient; 0 where the position is ignored.

    Raises:
        ValueError: the labels are of another shape than the hidden states.
    """
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels of shape {list(labels.shape)} for hidden states of {list(hidden.shape)}.")
    if chunk is None:
        chunk = chunk_size(labels.numel(), weight.shape[0])
    flat = hidden.flatten(0, -2), weight, labels.flatten()
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        total, token_loss = _ChunkedLoss.apply(*flat, softcap, chunk)
        return total, token_loss.view_as(labels)
    token_loss, _, _ = _losses(*flat, softcap, chunk, (False, False), None if predicted is None else predicted.view(-1))
    return token_loss.sum(), token_loss.view_as(labels)


class _ChunkedLoss(torch.autograd.Function):
    """(hidden [N, D], weight [V, D], labels [N]) → (sum of the losses [], losses [N] without a gradient)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, chunk: int
    ) -> tuple[Tensor, Tensor]:
        token_loss, *gradients = _losses(hidden, weight, labels, softcap, chunk, ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(token_loss)
        ctx.set_materialize_grads(False)
        return token_loss.sum(), token_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, grad_token_loss: None) -> tuple[Tensor | None, ...]:
        # In place, which saves a copy of the weight's gradient. Autograd refuses a second backward pass: it sees that
        # what was saved has changed.
        gradients = [None if gradient is None else gradient.mul_(grad_total) for gradient in ctx.saved_tensors]
        return (*gradients, None, None, None)


def _losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    softcap: float | None,
    chunk: int,
    with_gradients: tuple[bool, bool],
    predicted: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the losses [N], and the gradients of their sum: of hidden states and weight, where they are wanted.

    Without gradients, the best tokens are written into ``predicted`` int64 [N], if it is given.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    in_dtype = weight.to(dtype)
    valid = labels != IGNORED
    token_loss = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
    of_hidden = torch.empty_like(hidden) if with_gradients[0] else None
    of_weight = None
    if with_gradients[1]:
        of_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    with torch.autocast(device, enabled=False):
        for start in range(0, labels.numel(), chunk):
            rows = slice(start, start + chunk)
            valid_C1 = valid[rows, None]
            # Zeros where a position is ignored: then nothing of it reaches the weight's gradient, not even a NaN.
            hidden_CD = hidden[rows].to(dtype).where(valid_C1, 0)
            label_C1 = labels[rows, None].where(valid_C1, 0)
            logits_CV = (hidden_CD @ in_dtype.mT).float()
            loss_C1, gradient_CV = _of_logits(logits_CV, label_C1, softcap, any(with_gradients))
            del logits_CV  # it was overwritten
            if predicted is not None:
                predicted[rows] = gradient_CV.argmax(-1).where(valid_C1.squeeze(1), predicted[rows])
            token_loss[rows] = loss_C1.where(valid_C1, 0).squeeze(1)
            gradient_CV = gradient_CV.to(dtype)
            if of_hidden is not None:
                of_hidden[rows] = (gradient_CV @ in_dtype).where(valid_C1, 0)
            if of_weight is not None:
                _add_product(of_weight, gradient_CV.mT, hidden_CD)
            del gradient_CV  # before the next chunk's logits
    return token_loss, of_hidden, None if of_weight is None else of_weight.to(weight.dtype)


def _of_logits(logits: Tensor, label: Tensor, softcap: float | None, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Return the losses [C, 1] of logits [C, V] before the soft cap, and their gradient [C, V]; all fp32.

    The logits are overwritten. Without a gradient, the second result is the log-probabilities.
    """
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    log_probability = F.log_softmax(logits, dim=-1)
    loss = -log_probability.gather(1, label)
    if not with_gradient:
        return loss, log_probability
    gradient = log_probability.exp_()
    # One place in each row, so the order of these writes does not matter.
    gradient[torch.arange(len(label), device=label.device), label.squeeze(1)] -= 1
    if softcap is not None:  # the derivative of c·tanh(x/c) is 1 − tanh²
        gradient.addcmul_(gradient, logits.div_(softcap).square_(), value=-1)
    return loss, gradient


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to ``total`` [V, D], in the dtype of ``total``."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
