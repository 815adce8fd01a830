"""Counterfactual regret against brute force over all routes, one forward pass at a time by a rule of its own."""

import math
from dataclasses import dataclass
from itertools import combinations, pairwise

import pytest
import torch
from test_checkpoints_side_by_side import make, text
from torch import Tensor

from lightning_moe.analysis.counterfactual import Counterfactuals, Place, TokenSample, counterfactuals, other_routes
from lightning_moe.analysis.regret import MISSING, Regret, section
from lightning_moe.model import Decoder, next_token_loss
from lightning_moe.routing import ExpertThreshold, Phase, RoutingRule, RoutingState, Selection, TokenChoice

RULES = [ExpertThreshold(), TokenChoice()]


@dataclass(frozen=True)
class Fixed(RoutingRule):
    """Every token takes the experts that are written down, bool [1, S, E]."""

    mask: Tensor

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        return Selection(self.mask)


def brute_force(decoder: Decoder, place: Place) -> dict[tuple[int, tuple[int, ...]], tuple[float, float]]:
    """(layer, experts) → loss of the token and of all later ones together, for each set as large as the token's own."""
    layers = list(decoder.moe_layers())
    rule = layers[0].rule
    with torch.no_grad():
        decoder(place.input_ids[None])
    taken = [layer.record.selection.mask for layer in layers]
    found = {}
    for number in range(len(layers)):
        own = taken[number][0, place.position]
        for route in combinations(range(len(own)), int(own.sum())):
            masks = [mask.clone() for mask in taken]
            masks[number][0, place.position] = torch.tensor([expert in route for expert in range(len(own))])
            for layer, mask in zip(layers, masks, strict=True):
                layer.rule = Fixed(mask)
            with torch.no_grad():
                logits = decoder(place.input_ids[None]).logits
            losses = next_token_loss(logits, place.labels[None])[0].double()
            found[number, route] = (float(losses[place.position]), float(losses[place.position + 1 :].sum()))
            for layer in layers:
                layer.rule = rule
    return found


def places(number: int = 6, rows: int = 4) -> list[Place]:
    sample = TokenSample(number)
    list(sample.watch([text(rows)]))
    return sample.tokens


def test_other_routes_have_the_size_of_the_one_taken_and_differ() -> None:
    generator = torch.Generator().manual_seed(1)
    for size, number, expected in ((0, 9, 1), (1, 9, 8), (8, 9, 1), (2, 28, 28), (2, 5, 5), (4, 16, 16)):
        taken = torch.arange(8) < size
        # a router that is sure of itself: without rising noise there would never be another route
        routes = other_routes(taken, torch.linspace(0, 700, 8), number, generator)
        assert torch.equal(routes[0], taken)
        assert len({tuple(route) for route in routes.tolist()}) == len(routes) == expected
        assert (routes.sum(-1) == size).all()


def test_likely_routes_are_tried_first() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0, -9.0])
    generator = torch.Generator().manual_seed(1)
    counts = sum(other_routes(torch.arange(6) == 0, logits, 3, generator)[1:].double().sum(0) for _ in range(400)) / 400
    assert counts[0] == 0  # the route taken is not tried again
    assert counts[1:5].diff().lt(0).all()
    assert counts[5] < 0.02


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_all_routes_of_four_experts_are_brute_force(rule: RoutingRule, batch_size: int) -> None:
    decoder = make(rule, num_experts_per_token=2) if isinstance(rule, TokenChoice) else make(rule)
    tokens = places()
    done: list[int] = []
    found = counterfactuals(decoder, tokens, 6, batch_size, done.append)
    assert sum(done) == len(tokens)
    regret, sizes = Regret(found), set()
    for index, place in enumerate(tokens):
        expected = brute_force(decoder, place)
        assert not decoder.training
        for layer in range(2):
            mine = {route: losses for (of, route), losses in expected.items() if of == layer}
            sizes.add(len(next(iter(mine))))
            loss, later = (values[index, layer][: len(mine)] for values in (found.loss, found.later))
            assert found.loss[index, layer][len(mine) :].isnan().all()
            assert found.num_possible[index, layer] == len(mine)
            own, after = zip(*mine.values(), strict=True)
            assert loss.sort().values.tolist() == pytest.approx(sorted(own), abs=1e-4)
            assert later.sort().values.tolist() == pytest.approx(sorted(after), abs=1e-4)
            taken = route_taken(decoder, place, layer)
            assert float(loss[0]) == pytest.approx(mine[taken][0], abs=1e-4)
            assert float(regret.regret[index, layer]) == pytest.approx(mine[taken][0] - min(own), abs=1e-4)
            best = min(mine, key=lambda route: mine[route][0])
            assert float(regret.later[index, layer]) == pytest.approx(mine[best][1] - mine[taken][1], abs=1e-4)
            if len(mine) > 1:
                others = (sum(own) - mine[taken][0]) / (len(mine) - 1)
                assert float(regret.others[index, layer]) == pytest.approx(others - mine[taken][0], abs=1e-4)
            assert bool(regret.is_best[index, layer]) == (taken == best)
    assert sizes == {2} if isinstance(rule, TokenChoice) else len(sizes & {1, 2, 3}) > 1
    assert all(layer.replayed is None for layer in decoder.moe_layers())


def route_taken(decoder: Decoder, place: Place, layer: int) -> tuple[int, ...]:
    with torch.no_grad():
        decoder(place.input_ids[None])
    mask = list(decoder.moe_layers())[layer].record.selection.mask
    return tuple(mask[0, place.position].nonzero()[:, 0].tolist())


def test_some_of_the_routes_lie_between_none_and_all() -> None:
    decoder = make(TokenChoice(), num_experts=8, num_experts_per_token=2)
    tokens = places()
    few, all_of_them = (Regret(counterfactuals(decoder, tokens, number, 8)) for number in (4, 28))
    assert (few.num_tried == 4).all()
    assert (all_of_them.num_tried == 28).all()
    assert torch.allclose(few.taken, all_of_them.taken, atol=1e-5)
    assert (few.best >= all_of_them.best - 1e-5).all()
    assert 0 < float(few.regret.mean()) < float(all_of_them.regret.mean())
    curve = all_of_them.by_number_of_routes()
    assert curve[0] == 0
    assert curve[-1] == pytest.approx(float(all_of_them.regret.mean()))
    assert all(a <= b for a, b in pairwise(curve))
    numbers = few.numbers(few.everything)
    assert (numbers["all_routes_tried"], numbers["routes_tried"], numbers["taken_is_best_by_chance"]) == (0, 4, 0.25)


def test_the_sample_is_drawn_evenly_and_in_the_same_way_for_all() -> None:
    batches = [text(4), text(2), text(1)]
    valid = sum(int((batch.labels != -100).sum()) for batch in batches)
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(300):
        sample = TokenSample(7, seed)
        assert list(sample.watch(batches)) == batches
        assert len(sample.tokens) == 7
        for place in sample.tokens:
            assert place.labels[place.position] != -100
            key = (*place.input_ids.tolist(), place.position)
            counts[key] = counts.get(key, 0) + 1
    assert len(counts) == valid
    expected = 300 * 7 / valid
    assert max(abs(count - expected) for count in counts.values()) < 6 * math.sqrt(expected)
    everything = TokenSample(1000)
    list(everything.watch(batches))
    assert len(everything.tokens) == valid
    nothing = TokenSample(0)
    assert len(list(nothing.watch(batches))) == 3
    assert nothing.tokens == []


def two_tokens() -> Counterfactuals:
    """Two layers; the second token has no other route in the second layer."""
    nan = math.nan
    loss = torch.tensor([[[3.0, 1.0, 5.0], [3.0, 4.0, 6.0]], [[1.0, 2.0, nan], [1.0, nan, nan]]], dtype=torch.float64)
    later = torch.tensor([[[9.0, 8.0, 7.0], [9.0, 6.0, 5.0]], [[0.0, 1.0, nan], [0.0, nan, nan]]], dtype=torch.float64)
    return Counterfactuals(loss, later, torch.tensor([[3.0, 10.0], [2.0, 1.0]]))


def test_the_section_has_the_numbers_of_its_parts() -> None:
    made = section({"a": two_tokens(), "b": two_tokens()}, ["layer_00", "layer_01"])
    first, second = made.tables["regret_by_layer"][:2]
    assert first == {
        "checkpoint": "a", "layer": "layer_00", "pairs": 2, "pairs_with_a_choice": 2, "routes_tried": 2.5,
        "all_routes_tried": 1.0, "loss_taken": 2.0, "regret": 1.0, "standard_error": 1.0,
        "other_routes_minus_taken": 0.5, "taken_is_best": 0.5, "taken_is_best_by_chance": (1 / 3 + 1 / 2) / 2,
        "later": -0.5,
    }  # fmt: skip
    assert (second["pairs"], second["pairs_with_a_choice"], second["regret"], second["standard_error"]) == (
        2,
        1,
        0,
        None,
    )
    assert (second["other_routes_minus_taken"], second["later"], second["all_routes_tried"]) == (2.0, 0.0, 0.0)
    easiest = [row for row in made.tables["regret_by_loss"] if row["checkpoint"] == "a" and row["quarter"] == 1]
    assert [row["layer"] for row in easiest] == ["layer_00", "layer_01", "all"]
    assert [row["loss_taken"] for row in easiest] == [1.0, None, 1.0]
    routes = [row["regret"] for row in made.tables["regret_by_number_of_routes"] if row["checkpoint"] == "b"]
    assert routes == pytest.approx([0, 2 / 3, 2 / 3])
    assert made.summary[0]["with another route, of (token, layer) pairs"] == 0.75
    assert made.summary[0]["regret / nats"] == pytest.approx(2 / 3)
    assert made.summary[0]["the same, quarter of highest loss"] == 1.0
    assert list(made.figures) == ["regret"]


def test_what_cannot_be_shown_says_why() -> None:
    assert section({}, ["layer_00"]).missing == [MISSING]
    alone = Counterfactuals(torch.ones(2, 1, 1).double(), torch.ones(2, 1, 1).double(), torch.ones(2, 1).double())
    made = section({"a": alone}, ["layer_00"])
    assert made.missing == ["a: no token of 2 has another route; each takes no expert, or all of them."]
    assert not made.figures
    assert not made.tables
