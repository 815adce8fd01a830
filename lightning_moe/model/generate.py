"""Sampling with the key/value cache; routing follows the causal protocol, as in every evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.model.decoder import Decoder


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Tensor:
    """Continue each prompt by ``max_new_tokens`` tokens.

    Args:
        model: the decoder; it is put into ``eval()`` for the call and set back.
        prompt: int64 [B, S], S ≥ 1; all of one length.
        max_new_tokens: how many to add; with the prompt they must fit into ``max_sequence_length``.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the fewest tokens whose probability reaches p.
        seed: of the sampling; null continues torch's global generator.

    Returns:
        int64 [B, S + max_new_tokens], prompt included.

    Raises:
        UserError: the tokens do not fit, or an option is out of its range.
    """
    total = prompt.shape[1] + max_new_tokens
    if prompt.shape[1] < 1 or total > model.config.max_sequence_length + 1:
        raise UserError(
            f"prompt of {prompt.shape[1]} tokens + max_new_tokens={max_new_tokens}: the prompt must have at least 1 "
            f"token, and both together at most max_sequence_length + 1 = {model.config.max_sequence_length + 1}."
        )
    for name, value, ok, right in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "0 or more"),
        ("temperature", temperature, temperature >= 0, "0 or more"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1, or null"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1, or null"),
    ):
        if not ok:
            raise UserError(f"{name}={value}: must be {right}.")
    generator = None if seed is None else torch.Generator(device=prompt.device).manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        cache = model.new_cache(prompt.shape[0])
        tokens, new = [prompt], prompt
        for _ in range(max_new_tokens):
            logits = model(new, cache).logits[:, -1]  # [B, V]
            new = _sample(logits, temperature, top_k, top_p, generator)
            tokens.append(new)
        return torch.cat(tokens, dim=1)
    finally:
        model.train(was_training)


def _sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """One token per row, int64 [B, 1], from logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities = (logits / temperature).softmax(-1)
    if top_k is not None:
        kept = probabilities.topk(min(top_k, probabilities.shape[-1]), dim=-1)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, kept.indices, kept.values)
    if top_p is not None:
        ordered = probabilities.sort(dim=-1, descending=True)
        before = ordered.values.cumsum(-1) - ordered.values  # probability of the tokens ahead of each
        kept_values = torch.where(before < top_p * ordered.values.sum(-1, keepdim=True), ordered.values, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, ordered.indices, kept_values)
    return torch.multinomial(probabilities, 1, generator=generator)
