"""Sampling with the key/value cache; routing follows the causal protocol, as in every evaluation.

Prompts of different lengths need no padding (decision 43). The batch starts with as many tokens as the shortest prompt
has. A row with a longer prompt is then fed its own next token where the others are fed the sampled one. So every row
sees exactly the positions and the context that it would see alone, and its routing is that of the full forward pass.

Shape letters: B rows, S prompt tokens, T tokens of a chunk, L MoE layers, E experts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.model.causal_lm import CausalLM

#: (row, its new tokens so far, the last one included) → whether the row ends here. Called for every new token.
Stop = Callable[[int, list[int]], bool]


@dataclass(frozen=True)
class Chunk:
    """Tokens at the next positions of all rows; the chunks of a stream follow each other without a gap.

    Args:
        tokens: int64 [B, T].
        sampled: bool [B, T], true for new tokens of rows that had not ended before them. The others are tokens of a
            prompt, or mean nothing.
        experts: bool [B, T, L, E], the routed experts of each token; `None` unless asked for.
        log_probs: log-probability of each token given those before it, at temperature 1 and over the whole vocabulary,
            whatever it was sampled by; fp32 [B, T], and NaN in the first chunk, which holds tokens of prompts only.
    """

    tokens: Tensor
    sampled: Tensor
    experts: Tensor | None
    log_probs: Tensor


@torch.no_grad()
def generate(
    model: CausalLM,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Tensor:
    """Continue each prompt by ``max_new_tokens`` tokens.

    Args:
        model: the decoder. It is in ``eval()`` during the call, and set back afterwards.
        prompt: int64 [B, S], S ≥ 1; for prompts of different lengths see `generate_stream`.
        max_new_tokens: number of tokens to add; with the prompt they must fit into ``max_sequence_length`` + 1.
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: number of most likely tokens that are sampled from.
        top_p: probability that the fewest most likely tokens together must reach to be sampled from.
        seed: random seed for sampling; `None` continues torch's global generator.

    Returns:
        int64 [B, S + max_new_tokens], prompt included.

    Raises:
        UserError: the tokens do not fit, or an option is out of its range.
    """
    check_room(model, [prompt.shape[1]], max_new_tokens, False)
    if max_new_tokens == 0:
        return prompt
    chunks = generate_stream(model, prompt, max_new_tokens, temperature, top_k, top_p, seed)
    return torch.cat([chunk.tokens for chunk in chunks], dim=1)


@torch.no_grad()
def generate_stream(
    model: CausalLM,
    prompts: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | torch.Generator | None = None,
    stop: Stop | None = None,
    with_experts: bool = False,
) -> Iterator[Chunk]:
    """Continue prompts of any lengths, and yield each position as soon as it is known.

    The first chunk has as many tokens as the shortest prompt; every later chunk has one (decision 43). The rows share
    the random generator, so a row's sample depends on its batch; with ``temperature=0`` it does not.

    Args:
        model: the decoder. It is in ``eval()`` from the first chunk to the end of the iteration, then set back.
        prompts: token ids of each row, at least 1 each; or int64 [B, S].
        max_new_tokens: number of tokens to add to each row; with its prompt they must fit into
            ``max_sequence_length`` + 1, and with ``with_experts`` into ``max_sequence_length``.
        temperature: divisor of the logits, see `generate`.
        top_k: see `generate`.
        top_p: see `generate`.
        seed: random seed, see `generate`; or a generator on the model's device, which continues from its state.
        stop: function that ends a row early; the iteration ends when all rows have ended.
        with_experts: whether the last token is fed too, so that the experts of every token are known.

    Raises:
        UserError: the tokens do not fit, or an option is out of its range.
    """
    rows = [list(map(int, row)) for row in prompts] if not isinstance(prompts, Tensor) else prompts.tolist()
    lengths = torch.tensor([len(row) for row in rows])
    check_room(model, lengths.tolist(), max_new_tokens, with_experts)
    _check_sampling(temperature, top_k, top_p)
    device = model.device
    tokens = _pad(prompts, rows, max_new_tokens).to(device)
    generator = torch.Generator(device=device).manual_seed(seed) if isinstance(seed, int) else seed
    new: list[list[int]] = [[] for _ in rows]
    ended = [max_new_tokens == 0] * len(rows)
    was_training = model.training
    model.eval()
    try:
        cache = model.new_cache(len(rows), min(tokens.shape[1], model.max_sequence_length))
        start, end = 0, int(lengths.min())
        sampled = torch.zeros(len(rows), end, dtype=torch.bool)
        log_probs = torch.full((len(rows), end), math.nan, device=device)
        while True:
            fed = tokens[:, start:end]
            is_last = all(ended) and end >= int(lengths.max())
            if is_last and not with_experts:
                yield Chunk(fed, sampled, None, log_probs)
                return
            logits = model(fed, cache, last_only=True).logits[:, 0]  # [B, V]
            yield Chunk(fed, sampled, _experts(model, fed.shape) if with_experts else None, log_probs)
            if is_last:
                return
            start, end = end, end + 1
            goes_on = lengths <= start  # rows whose prompt has ended
            draw = _sample(logits, temperature, top_k, top_p, generator)[:, 0]
            tokens[:, start] = torch.where(goes_on.to(device), draw, tokens[:, start])
            log_probs = logits.float().log_softmax(-1).gather(1, tokens[:, start:end])
            sampled = torch.tensor([[bool(goes_on[row]) and not ended[row]] for row in range(len(rows))])
            for row, token in enumerate(tokens[:, start].tolist()):
                if sampled[row]:
                    new[row].append(token)
                    stopped = stop is not None and stop(row, new[row])
                    ended[row] = stopped or len(new[row]) == max_new_tokens
    finally:
        model.train(was_training)


def _pad(prompts: Tensor | Sequence[Sequence[int]], rows: list[list[int]], max_new_tokens: int) -> Tensor:
    """Return the prompts as [B, longest + max_new_tokens]; the rest is 0, and overwritten before it is fed."""
    if isinstance(prompts, Tensor):  # of any type: the embedding refuses what is no token
        return torch.cat([prompts, prompts.new_zeros(len(rows), max_new_tokens)], dim=1)
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row) + max_new_tokens) for row in rows], dtype=torch.int64)


def _experts(model: CausalLM, shape: torch.Size) -> Tensor:
    """Return what the MoE layers chose in the last forward pass, bool [B, T, L, E]."""
    masks = [layer.record.selection.mask for layer in model.moe_layers() if layer.record is not None]
    return torch.stack(masks, dim=2) if masks else torch.zeros(*shape, 0, model.num_experts, dtype=torch.bool)


def check_room(model: CausalLM, lengths: Sequence[int], max_new_tokens: int, with_experts: bool) -> None:
    """Raise `UserError` unless prompts of such lengths can be continued by `generate_stream`."""
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens={max_new_tokens}: must be 0 or more.")
    if not lengths:
        raise UserError("no prompt: give at least one.")
    room, spelled = model.max_sequence_length, "max_sequence_length"
    if not with_experts:  # the last new token need not be fed
        room, spelled = room + 1, f"{spelled} + 1"
    for length in (min(lengths), max(lengths)):
        if length < 1 or length + max_new_tokens > room:
            raise UserError(
                f"prompt of {length} tokens + max_new_tokens={max_new_tokens}: the prompt must have at least 1 "
                f"token, and both together at most {spelled} = {room}."
            )


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    for name, value, ok, right in (
        ("temperature", temperature, 0 <= temperature < math.inf, "0 or more"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1, or None"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1, or None"),
    ):
        if not ok:
            raise UserError(f"{name}={value}: must be {right}.")


def _sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Sample one token per row, int64 [B, 1], from logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    # from the largest logit down, so that a temperature near 0 gives it all the probability instead of inf − inf
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)).softmax(-1)
    if top_k is not None:
        kept = probabilities.topk(min(top_k, probabilities.shape[-1]), dim=-1)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, kept.indices, kept.values)
    if top_p is not None:
        ordered = probabilities.sort(dim=-1, descending=True)
        before = ordered.values.cumsum(-1) - ordered.values  # probability of the tokens ahead of each
        kept_values = torch.where(before < top_p * ordered.values.sum(-1, keepdim=True), ordered.values, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, ordered.indices, kept_values)
    return torch.multinomial(probabilities, 1, generator=generator)
