"""The loss of single tokens on other routes than the one taken, in one MoE layer at a time.

Everything else stays: the layers above and below, and all other tokens, take the experts that they took. Only then do
the routes of a token cost the same, because a router with thresholds may otherwise send the changed token, or a later
one, to more or fewer experts. A token's route reaches the tokens after it through attention, so no two positions of a
row are changed at once: each route is a row of a batch, and the result is exact.

Shape letters: T tokens, S positions of a window, L MoE layers, E experts, M routes of a token and layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from lightning_moe.analysis.observe import Batch, observe
from lightning_moe.model import CausalLM, in_phase, replay
from lightning_moe.routing import Phase


@dataclass(frozen=True)
class Place:
    """One token of the text, in its window.

    Args:
        input_ids: int64 [S].
        labels: int64 [S], shifted by one; −100 for padding.
        position: index of the token in the window.
    """

    input_ids: Tensor
    labels: Tensor
    position: int


class TokenSample:
    """Tokens drawn at random from a stream of text whose length is not known; each is as likely as any other.

    Args:
        number: number of tokens to draw; fewer if the text has fewer.
        seed: random seed for the draw.
    """

    def __init__(self, number: int, seed: int = 0) -> None:
        self.number = number
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: list[tuple[float, Place]] = []

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches on, and draw from them."""
        for batch in batches:
            if self.number:
                self._draw(batch)
            yield batch

    def _draw(self, batch: Batch) -> None:
        """Give every token a random number; those with the lowest of all so far are kept."""
        where = (batch.labels != -100).nonzero()
        drawn = torch.rand(len(where), generator=self._generator, dtype=torch.float64)
        lowest = drawn.topk(min(self.number, len(drawn)), largest=False)
        for key, (row, position) in zip(lowest.values.tolist(), where[lowest.indices].tolist(), strict=True):
            self._kept.append((key, Place(batch.input_ids[row].clone(), batch.labels[row].clone(), position)))
        self._kept = sorted(self._kept, key=lambda kept: kept[0])[: self.number]

    @property
    def tokens(self) -> list[Place]:
        """The tokens drawn so far, in random order."""
        return [place for _, place in self._kept]


@dataclass(frozen=True)
class Counterfactuals:
    """Losses of tokens on several routes of equal size. The first route is the one taken; NaN where there are no more.

    Args:
        loss: loss of the token's own prediction in nats, fp64 [T, L, M].
        later: the same, summed over all later tokens of the window, fp64 [T, L, M].
        num_possible: number of routes of that size, tried or not, fp64 [T, L].
    """

    loss: Tensor
    later: Tensor
    num_possible: Tensor


def other_routes(taken: Tensor, logits: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Return a token's route and others of as many experts, each once, in random order after the first.

    If there are at most ``number`` routes of this size, all are returned. Otherwise they are drawn as the router would
    draw them without replacement from the softmax of its logits (Gumbel noise, then the highest), as arXiv 2605.07260
    does: of the very many routes of a large model, those that the router finds unlikely are rarely good ones.

    Args:
        taken: bool [E].
        logits: router logits, fp32 [E].
        number: largest number of routes, the one taken included.
        generator: random generator for the draw.

    Returns:
        bool [M, E], with ``taken`` first.
    """
    size, num_experts = int(taken.sum()), len(taken)
    mine = tuple(taken.nonzero()[:, 0].tolist())
    if math.comb(num_experts, size) <= number:
        others = [route for route in combinations(range(num_experts), size) if route != mine]
        others = [others[index] for index in torch.randperm(len(others), generator=generator).tolist()]
    else:
        distinct: dict[tuple[int, ...], None] = {}
        temperature = 1.0
        while len(distinct) < number - 1:
            gumbel = -torch.empty(8 * number, num_experts).exponential_(generator=generator).log()
            drawn = (logits / temperature + gumbel).topk(size).indices.sort(-1).values
            distinct |= {route: None for route in map(tuple, drawn.tolist()) if route != mine}
            temperature *= 2  # a router that is sure of itself draws the same routes again and again
        others = list(distinct)[: number - 1]
    routes = torch.zeros(1 + len(others), num_experts, dtype=torch.bool)
    routes[0] = taken
    for row, route in zip(routes[1:], others, strict=True):
        row[list(route)] = True
    return routes


def counterfactuals(
    decoder: CausalLM,
    tokens: Sequence[Place],
    num_routes: int,
    batch_size: int,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Counterfactuals:
    """Measure the loss of tokens on other routes, routed causally. It takes up to T · L · M rows of S tokens.

    Args:
        decoder: model with MoE layers; nothing in it changes.
        tokens: the T tokens.
        num_routes: largest number M of routes of a token and layer, the one taken included.
        batch_size: number of rows in a pass.
        progress: function that is called with the number of tokens that are done, one by one.
    """
    generator = torch.Generator().manual_seed(0)
    num_layers = len(list(decoder.moe_layers()))
    shape = (len(tokens), num_layers, num_routes)
    loss, later = torch.full(shape, math.nan, dtype=torch.float64), torch.full(shape, math.nan, dtype=torch.float64)
    num_possible = torch.ones(shape[:2], dtype=torch.float64)
    for index, place in enumerate(tokens):
        seen = observe(decoder, Batch(place.input_ids[None], place.labels[None], torch.zeros(1, dtype=torch.int64)))
        experts, logits, at = seen.experts[0], seen.logits[0], place.position
        rows: list[tuple[int, int, Tensor]] = []  # layer, number of the route, route
        for layer in range(num_layers):
            taken = experts[at, layer]
            num_possible[index, layer] = float(math.comb(len(taken), int(taken.sum())))
            routes = other_routes(taken, logits[at, layer], num_routes, generator)
            rows += [(layer, number, route) for number, route in enumerate(routes)]
        for first in range(0, len(rows), batch_size):
            chunk = rows[first : first + batch_size]
            masks = experts.expand(len(chunk), -1, -1, -1).clone()  # [rows, S, L, E]
            for row, (layer, _, route) in enumerate(chunk):
                masks[row, at, layer] = route
            losses = _losses(decoder, place, masks)
            for row, (layer, number, _) in enumerate(chunk):
                loss[index, layer, number] = losses[row, at]
                later[index, layer, number] = losses[row, at + 1 :].sum()
        progress(1)
    return Counterfactuals(loss, later, num_possible)


def _losses(decoder: CausalLM, place: Place, masks: Tensor) -> Tensor:
    """Return the losses of a window, fp64 [rows, S], where each row takes experts of its own, bool [rows, S, L, E]."""
    device, rows = decoder.device, len(masks)
    forced = masks.to(device).unbind(2)
    ids, labels = (part.to(device).expand(rows, -1) for part in (place.input_ids, place.labels))
    with in_phase(decoder, Phase.CAUSAL), replay(decoder, forced):
        losses: Tensor = decoder(ids, labels=labels).token_loss
    return losses.double().cpu()
