"""Next-token loss and distillation of one model from another, without holding all logits of either.

Shape letters: N tokens, C tokens of a chunk, D features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_moe.model.loss_head import IGNORED, chunk_size


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    to_logits: Callable[[Tensor], Tensor],
    labels: Tensor,
    vocab_size: int,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute both losses of every position, some positions at a time; the backward pass computes the logits again.

    Args:
        student: features of the student [B, S, D], with a gradient.
        teacher: features of the teacher [B, S, D].
        to_logits: head that both share, features [C, D] → logits fp32 [C, V].
        labels: int64 [B, S], already shifted; positions with -100 have losses 0.
        vocab_size: number V of tokens.
        temperature: temperature T of both distributions.
        chunk: number of positions per chunk; `None` for as many as fit into the memory that `model.loss_head` allows.

    Returns:
        token_loss: cross-entropy in nats, fp32 [B, S].
        divergence: T² · KL(teacher ‖ student) in nats, fp32 [B, S]. Both have gradients in ``student``.
    """
    size = chunk_size(labels.numel(), vocab_size) if chunk is None else chunk

    def losses(student_CD: Tensor, teacher_CD: Tensor, label_C: Tensor) -> tuple[Tensor, Tensor]:
        logits_CV = to_logits(student_CD)
        token_loss_C = F.cross_entropy(logits_CV, label_C, reduction="none", ignore_index=IGNORED)
        with torch.no_grad():
            target_CV = (to_logits(teacher_CD) / temperature).log_softmax(-1)
        own_CV = (logits_CV / temperature).log_softmax(-1)
        divergence_C = (target_CV.exp() * (target_CV - own_CV)).sum(-1) * temperature**2
        return token_loss_C, divergence_C.where(label_C != IGNORED, 0.0)

    parts = zip(
        *(one.split(size) for one in (student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten())), strict=True
    )
    found = [checkpoint(losses, *part, use_reentrant=False) for part in parts]
    token_loss, divergence = (torch.cat(one).view_as(labels) for one in zip(*found, strict=True))
    return token_loss, divergence
