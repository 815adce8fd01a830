"""Tokens of a generation, with the experts that each of them took.

Shape letters: R rows, P positions, L MoE layers, E experts; B rows and S positions of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.model import CausalLM, named_moe_layers


@dataclass(frozen=True)
class Made:
    """How a generation was made.

    Args:
        layers: names of the MoE layers.
        num_experts: number E of experts of each layer.
        vocab_size: number of tokens of the vocabulary.
        precision: precision that the model computed in, see `model.precision`.
        weights: `weights_fingerprint` of the model; empty if it was not taken.
        temperature: divisor of the logits.
        top_k: number of most likely tokens that were sampled from; `None` for all.
        top_p: probability of the most likely tokens that were sampled from; `None` for all.
        inference_num_experts_per_token: value of the compute dial; `None` if it was not used.
    """

    layers: list[str]
    num_experts: int
    vocab_size: int
    precision: str
    weights: str = ""
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    inference_num_experts_per_token: list[float] | None = None

    @property
    def samples_the_model(self) -> bool:
        """Whether tokens were drawn from the model's own distribution, neither sharpened nor cut."""
        return self.temperature == 1 and self.top_k is None and self.top_p in (None, 1)


@dataclass(frozen=True)
class ReplayBatch:
    """Some rows, ready for a pass; shorter rows are padded on the right, which no earlier position sees.

    Args:
        input_ids: int64 [B, S]; 0 after the end of a row.
        labels: int64 [B, S], shifted by one: the new tokens; −100 where the next token is one of the prompt, or none.
        known: bool [B, S], whether a position belongs to its row.
        experts: experts of each layer, bool [B, S, E], as `model.replay` takes them; none after the end of a row.
    """

    input_ids: Tensor
    labels: Tensor
    known: Tensor
    experts: list[Tensor]


@dataclass(frozen=True)
class Routes:
    """A generation on record.

    Args:
        tokens: prompts and new tokens, int64 [R, P]; 0 after the end of a row.
        prompt_lengths: tokens of each prompt, int64 [R].
        lengths: tokens of each row, the prompt included, int64 [R].
        experts: experts that each token took, bool [R, P, L, E]; none after the end of a row.
        log_probs: log-probability of each new token when it was generated, at temperature 1 and over the whole
            vocabulary, fp32 [R, P]; 0 elsewhere.
        made: how they came about.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    experts: Tensor
    log_probs: Tensor
    made: Made

    @property
    def known(self) -> Tensor:
        """Positions that belong to a row, bool [R, P]."""
        return torch.arange(self.tokens.shape[1]) < self.lengths[:, None]

    @property
    def new(self) -> Tensor:
        """Positions of new tokens, bool [R, P]."""
        return self.known & (torch.arange(self.tokens.shape[1]) >= self.prompt_lengths[:, None])

    def batch(self, start: int = 0, stop: int | None = None, device: torch.device | str = "cpu") -> ReplayBatch:
        """Return the rows from ``start`` to before ``stop``, by default all of them, on a device."""
        rows = slice(start, stop)
        end = int(self.lengths[rows].max())
        tokens, known = self.tokens[rows, :end], self.known[rows, :end]
        labels = torch.full_like(tokens, -100)
        labels[:, :-1] = tokens[:, 1:].where(self.new[rows, 1:end], -100)
        experts = self.experts[rows, :end].to(device)
        return ReplayBatch(tokens.to(device), labels.to(device), known.to(device), list(experts.unbind(2)))

    def check_fits(self, model: CausalLM) -> None:
        """Refuse a model that these tokens and experts do not fit.

        Raises:
            UserError: it has other MoE layers, another number of experts, a smaller vocabulary, or a shorter context.
        """
        made, layers = self.made, list(named_moe_layers(model))
        for name, recorded, own in (
            ("MoE layers", ", ".join(made.layers), ", ".join(layers) or "none: it is dense"),
            ("experts per layer", made.num_experts, model.num_experts),
            ("vocabulary", made.vocab_size, model.vocab_size),
        ):
            if recorded != own:
                raise UserError(f"the routes are of another model: {name}: {recorded}; this model has {own}.")
        longest = int(self.lengths.max())
        if longest > model.max_sequence_length:
            raise UserError(
                f"the routes have a row of {longest} positions, but the model's context is {model.max_sequence_length}."
            )
