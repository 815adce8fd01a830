"""The tokens of a generation scored in full passes: once routed freely, and once with the routes on record.

Shape letters: N new tokens, L MoE layers, E experts, V vocabulary; B rows and S positions of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.model import CausalLM, in_phase, named_moe_layers, replay
from lightning_moe.replay.routes import ReplayBatch, Routes
from lightning_moe.routing import Phase


@dataclass(frozen=True)
class Flips:
    """How far a pass took other experts than the generation, over all tokens, those of the prompts included.

    Args:
        tokens: share of the tokens that took another set of experts, for each layer.
        pairs: token–expert pairs that only one of both has, divided by the pairs of both, for each layer: 1/k if one
            of k experts is exchanged.
        tokens_in_any_layer: share of the tokens that took another set in at least one layer.
    """

    tokens: list[float]
    pairs: list[float]
    tokens_in_any_layer: float


@dataclass(frozen=True)
class Divergence:
    """How far a pass judges the new tokens otherwise than the generation did.

    With r = log p(token) in the generation − log p(token) in the pass, the means of r and of exp(−r) − 1 + r both
    estimate KL(generation ‖ pass) per token without bias, if the tokens were drawn from the model's own distribution
    (`Made.samples_the_model`). The second is never negative and varies less. See http://joschu.net/blog/kl-approx.html.

    Args:
        log_ratio: mean of r in nats.
        log_ratio_error: its standard error, with tokens taken as independent; `None` for a single token.
        kl: mean of exp(−r) − 1 + r.
        kl_error: its standard error.
        largest: largest |r|.
    """

    log_ratio: float
    log_ratio_error: float | None
    kl: float
    kl_error: float | None
    largest: float

    @classmethod
    def of(cls, ratio: Tensor) -> Divergence:
        """Return it for log-ratios r, fp64 [N]."""
        estimate = torch.special.expm1(-ratio) + ratio
        errors = [float(values.std()) / len(values) ** 0.5 if len(values) > 1 else None for values in (ratio, estimate)]
        return cls(float(ratio.mean()), errors[0], float(estimate.mean()), errors[1], float(ratio.abs().max()))


@dataclass(frozen=True)
class Score:
    """The result of `score`.

    Args:
        layers: names of the MoE layers.
        num_tokens: number of tokens, those of the prompts included.
        num_new_tokens: number N of new tokens.
        free_flips: flips of the pass that the rule routed; with the routes on record there are none.
        free: divergence of the pass that the rule routed.
        replayed: divergence of the pass with the routes on record.
        free_to_replayed: KL(freely routed ‖ with the routes on record) of the next token, exact, mean over the new
            tokens in nats.
    """

    layers: list[str]
    num_tokens: int
    num_new_tokens: int
    free_flips: Flips
    free: Divergence
    replayed: Divergence
    free_to_replayed: float


def score(model: CausalLM, routes: Routes, batch_size: int = 8) -> Score:
    """Score the tokens in full passes without gradients, routed causally and as recorded.

    Args:
        model: model of the same shape, in any precision, also under autocast; its weights may be others.
        routes: generation on record, with at least one new token.
        batch_size: number of rows in a pass; two times B · S · V logits are held.

    Raises:
        UserError: the tokens and routes do not fit the model.
        RuntimeError: a layer took other experts than those on record.
    """
    routes.check_fits(model)
    layers = named_moe_layers(model)
    counts = _Counts(len(layers))
    ratios: tuple[list[Tensor], list[Tensor]] = ([], [])
    divergences: list[Tensor] = []
    for start in range(0, len(routes.tokens), batch_size):
        batch = routes.batch(start, start + batch_size, model.device)
        scored = batch.labels != -100
        recorded = routes.log_probs[start : start + batch_size, : scored.shape[1]].to(model.device)
        recorded = recorded.roll(-1, dims=1)[scored].double()  # of the token that a position predicts
        free = _log_probs(model, batch)
        counts.add(batch, [layer.record.selection.mask for layer in layers.values() if layer.record is not None])
        with replay(model, batch.experts):
            replayed = _log_probs(model, batch)
        for name, layer, experts in zip(layers, layers.values(), batch.experts, strict=True):
            if layer.record is None or not torch.equal(layer.record.selection.mask, experts):
                raise RuntimeError(f"{name}: took other experts than those on record.")
        token = batch.labels[scored][:, None]
        for found, log_probs in zip(ratios, (free, replayed), strict=True):
            found.append((recorded - log_probs.gather(1, token)[:, 0].double()).cpu())
        divergences.append((free.exp() * (free - replayed)).double().sum(-1).cpu())
    free_ratio, replayed_ratio = (torch.cat(parts) for parts in ratios)
    return Score(
        list(layers),
        int(routes.lengths.sum()),
        len(free_ratio),
        counts.flips(),
        Divergence.of(free_ratio),
        Divergence.of(replayed_ratio),
        float(torch.cat(divergences).mean()),
    )


def _log_probs(model: CausalLM, batch: ReplayBatch) -> Tensor:
    """Return the log-probabilities of all tokens where a new token is predicted, fp32 [N, V]."""
    with in_phase(model, Phase.CAUSAL):
        logits: Tensor = model(batch.input_ids).logits
    return logits[batch.labels != -100].float().log_softmax(-1)


class _Counts:
    """Counts of differing tokens and token–expert pairs."""

    def __init__(self, num_layers: int) -> None:
        self.num_tokens = self.any_layer = 0
        self.tokens = torch.zeros(num_layers, dtype=torch.int64)
        self.differing = torch.zeros(num_layers, dtype=torch.int64)
        self.pairs = torch.zeros(num_layers, dtype=torch.int64)

    def add(self, batch: ReplayBatch, found: Sequence[Tensor]) -> None:
        """Add the experts of each layer, bool [B, S, E], beside those on record."""
        mine, recorded = (
            torch.stack(list(masks), 2)[batch.known] for masks in (found, batch.experts)
        )  # [tokens, L, E]
        flipped = (mine != recorded).any(-1)
        self.num_tokens += len(mine)
        self.any_layer += int(flipped.any(-1).sum())
        self.tokens += flipped.sum(0).cpu()
        self.differing += (mine != recorded).sum((0, 2)).cpu()
        self.pairs += (mine.sum((0, 2)) + recorded.sum((0, 2))).cpu()

    def flips(self) -> Flips:
        return Flips(
            (self.tokens / self.num_tokens).tolist(),
            (self.differing / self.pairs.clamp_min(1)).tolist(),
            self.any_layer / self.num_tokens,
        )
