"""Recording the routes of a generation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.hf import TransformersLM
from lightning_moe.model import CausalLM, generate_stream, named_moe_layers
from lightning_moe.model.precision import precision_of
from lightning_moe.replay.routes import Made, Routes


class Recorder:
    """Collector of the tokens of several rows, which come in order within each row.

    Args:
        num_rows: number R of rows.
    """

    def __init__(self, num_rows: int) -> None:
        self._tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self._experts: list[list[Tensor]] = [[] for _ in range(num_rows)]
        self._log_probs: list[list[float]] = [[] for _ in range(num_rows)]
        self._prompt_lengths = [0] * num_rows

    def add(self, row: int, token: int, experts: Tensor, log_prob: float | None) -> None:
        """Add the next token of a row.

        Args:
            row: index of the row.
            token: id of the token.
            experts: experts that it took, bool [L, E].
            log_prob: log-probability of a new token; `None` for one of the prompt.
        """
        self._tokens[row].append(token)
        self._experts[row].append(experts)
        self._log_probs[row].append(0.0 if log_prob is None else log_prob)
        self._prompt_lengths[row] += log_prob is None

    def routes(self, made: Made) -> Routes:
        """Return what was recorded."""
        lengths = [len(row) for row in self._tokens]
        shape = (len(lengths), max(lengths))
        tokens, log_probs = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
        experts = torch.zeros(*shape, len(made.layers), made.num_experts, dtype=torch.bool)
        for row, length in enumerate(lengths):
            tokens[row, :length] = torch.tensor(self._tokens[row])
            experts[row, :length] = torch.stack(self._experts[row])
            log_probs[row, :length] = torch.tensor(self._log_probs[row])
        return Routes(tokens, torch.tensor(self._prompt_lengths), torch.tensor(lengths), experts, log_probs, made)


def how_made(model: CausalLM, weights: str = "", **settings: Any) -> Made:
    """Return how a generation with this model is made; ``settings`` are further fields of `Made`.

    Raises:
        UserError: the model is dense.
    """
    layers = list(named_moe_layers(model))
    if not layers:
        raise UserError("the dense model has no routes to record: every token takes the same path.")
    return Made(layers, model.num_experts, model.vocab_size, precision_of(model), weights, **settings)


def generate_routes(
    model: CausalLM,
    prompts: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    **options: Any,
) -> Routes:
    """Continue prompts as `model.generate_stream` does, and return the tokens with their routes.

    Args:
        model: model with MoE layers, in any precision, also under autocast.
        prompts: token ids of each row; or int64 [B, S].
        max_new_tokens: number of tokens to add to each row.
        temperature: see `generate_stream`, as the following.
        top_k: see there.
        top_p: see there.
        options: ``seed`` and ``stop`` of `generate_stream`.

    Raises:
        UserError: the model is dense, the tokens do not fit, or an option is out of its range.
    """
    made = how_made(model, temperature=temperature, top_k=top_k, top_p=top_p)
    rows = prompts.tolist() if isinstance(prompts, Tensor) else prompts
    recorder, position = Recorder(len(rows)), 0
    chunks = generate_stream(model, prompts, max_new_tokens, temperature, top_k, top_p, with_experts=True, **options)
    for chunk in chunks:
        assert chunk.experts is not None
        experts, tokens, log_probs = chunk.experts.cpu(), chunk.tokens.tolist(), chunk.log_probs.tolist()
        for row, prompt in enumerate(rows):
            for index, token in enumerate(tokens[row]):
                sampled = bool(chunk.sampled[row, index])
                if sampled or position + index < len(prompt):
                    recorder.add(row, token, experts[row, index], log_probs[row][index] if sampled else None)
        position += chunk.tokens.shape[1]
    return recorder.routes(made)


def weights_fingerprint(model: CausalLM) -> str:
    """Return a hash of the weights and the routing state, with their names and shapes.

    That of a released model is of its numbers rounded to bf16, so that it is the same in every dtype.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        digest.update(f"{name} {list(value.shape)}\n".encode())
        if isinstance(model, TransformersLM) and value.is_floating_point():
            value = value.to(torch.bfloat16)
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
