"""Fanout, specialisation, usage, logits and intensity against counts token by token; however the text is batched."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from observations import DOMAINS, EXPERTS, LAYERS, SEQUENCE, VOCABULARY, random_observation, tokens_of

from lightning_moe.analysis.fanout import LOSS_BINS, Fanout, section
from lightning_moe.analysis.intensity import FEWEST_OCCURRENCES, Intensity
from lightning_moe.analysis.observe import Observation
from lightning_moe.analysis.router_logits import NUM_BINS, RouterLogits
from lightning_moe.analysis.specialization import Specialization
from lightning_moe.analysis.usage import MOST_BATCHES, CutoffUsage
from lightning_moe.routing import target_count

seeds = st.lists(st.integers(0, 2**31), min_size=1, max_size=3, unique=True)


@settings(max_examples=15)
@given(seeds=seeds)
def test_fanout_by_position_and_loss(seeds: list[int]) -> None:
    seen = [random_observation(seed) for seed in seeds]
    fanout = Fanout(LAYERS, SEQUENCE)
    for observation in seen:
        fanout.update(observation)
    groups = {
        "position": (fanout.by_position, lambda t: t["position"], SEQUENCE),
        "loss": (fanout.by_loss, lambda t: min(int(t["loss"] / 0.5), LOSS_BINS - 1), LOSS_BINS),
    }
    for sums, group_of, count in groups.values():
        per_layer, mean, error = sums.means()
        for group in range(count):
            chosen = [np.sum(t["experts"], axis=1) for t in tokens_of(seen) if group_of(t) == group]  # [n][L]
            assert int(sums.count[group]) == len(chosen)
            if not chosen:
                assert math.isnan(mean[group])
                continue
            np.testing.assert_allclose(per_layer[group], np.mean(chosen, axis=0))
            of_layers = np.mean(chosen, axis=1)
            assert float(mean[group]) == pytest.approx(of_layers.mean())
            assert float(error[group]) == pytest.approx(of_layers.std() / math.sqrt(len(chosen)), abs=1e-7)
    assert int(fanout.by_loss.count[-1]) == sum(t["loss"] >= 15.5 for t in tokens_of(seen))


@given(
    losses=st.lists(st.sampled_from([0.1, 0.7, 3.2, 9.9, 40.0]), min_size=1, max_size=30),
    seed=st.integers(0, 99),
)
def test_easiest_and_hardest_tokens(losses: list[float], seed: int) -> None:
    """At either end the fewest whole bins that are not empty, one at least, with up to a quarter of the tokens."""
    seen = random_observation(seed, batch=len(losses), padding=False)
    loss = torch.tensor(losses)[:, None].expand(-1, SEQUENCE)
    fanout = Fanout(LAYERS, SEQUENCE)
    fanout.update(replace(seen, loss=loss))
    [row] = section({"a": fanout}, ["layer_01", "layer_02"], {"a": 1.0}).summary
    of_row = seen.experts.double().sum(-1).mean((1, 2)).tolist()
    bins = [min(int(value / 0.5), LOSS_BINS - 1) for value in losses]
    filled = sorted(set(bins))
    for ordered, column in ((filled, "easiest"), (filled[::-1], "hardest")):
        chosen: list[float] = []
        for number in ordered:
            more = [f for f, mine in zip(of_row, bins, strict=True) if mine == number]
            if chosen and len(chosen) + len(more) > len(losses) / 4:
                break
            chosen += more
        assert row[f"{column} tokens (about a quarter)"] == pytest.approx(np.mean(chosen))


def test_neighbouring_positions_are_merged() -> None:
    fanout = Fanout(LAYERS, SEQUENCE)
    fanout.update(random_observation(1))
    merged = fanout.by_position.merged(4)
    assert merged.count.tolist() == fanout.by_position.count.view(3, 2).sum(1).tolist()
    assert torch.equal(merged.total, fanout.by_position.total.view(3, 2, LAYERS).sum(1))
    assert fanout.by_position.merged(100).count.tolist() == fanout.by_position.count.tolist()


@settings(max_examples=15)
@given(seeds=seeds)
def test_specialization(seeds: list[int]) -> None:
    seen = [random_observation(seed) for seed in seeds]
    result = Specialization(DOMAINS, LAYERS, EXPERTS, end_of_text_id=0)
    for observation in seen:
        result.update(observation)
    usage = []
    for domain in range(DOMAINS):
        masks = [t["experts"] for t in tokens_of(seen) if t["domain"] == domain]
        counts = np.sum(masks, axis=0) if masks else np.zeros((LAYERS, EXPERTS))
        np.testing.assert_array_equal(result.load[domain], counts)
        assert int(result.tokens[domain]) == len(masks)
        np.testing.assert_allclose(result.shares()[domain], counts / max(1, len(masks)))
        usage.append(counts / np.maximum(1, counts.sum(-1, keepdims=True)))
    np.testing.assert_allclose(result.distance(0, 1), np.abs(usage[0] - usage[1]).sum(-1) / 2)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31))
def test_halves_of_a_domain_are_whole_documents(seed: int) -> None:
    """Token 0 begins a document, which may go on in the next window of its domain, in this batch or a later one."""
    seen = [random_observation(seed + number) for number in range(3)]
    result = Specialization(DOMAINS, LAYERS, EXPERTS, end_of_text_id=0)
    for observation in seen:
        result.update(observation)
    for domain in range(DOMAINS):
        documents: list[list[dict]] = [[]]
        for token in (t for t in tokens_of(seen) if t["domain"] == domain):
            documents += [[]] if token["token"] == 0 else []
            documents[-1].append(token)
        halves: list[list[dict]] = [[], []]
        for document in documents:
            halves[len(halves[0]) > len(halves[1])] += document
        for half, tokens in enumerate(halves):
            assert int(result.half_tokens[half, domain]) == len(tokens)
            counts = np.sum([t["experts"] for t in tokens], axis=0) if tokens else np.zeros((LAYERS, EXPERTS))
            np.testing.assert_array_equal(result.half_load[half, domain], counts)


def _documents(counts: tuple[int, int], generator: torch.Generator, length: int = 40) -> Specialization:
    """Two domains of documents that all come from one source; each document prefers two of 8 experts."""
    result = Specialization(2, 1, 8, end_of_text_id=0)
    for domain, count in enumerate(counts):
        preferred = torch.rand(count, 8, generator=generator).topk(2).indices
        experts = torch.zeros(count, length, 1, 8, dtype=torch.bool)
        taken = torch.randint(0, 2, (count, length, 1), generator=generator)
        experts.scatter_(3, preferred.gather(1, taken[..., 0])[..., None, None], True)
        tokens = torch.ones(count, length, dtype=torch.int64)
        tokens[:, 0] = 0
        of_domain = torch.full((count,), domain)
        nothing = torch.zeros(count, length)
        gates = experts.float()
        result.update(Observation(tokens, tokens >= 0, of_domain, nothing, gates, experts, gates, tokens, None))
    return result


@pytest.mark.parametrize("counts", [(60, 60), (30, 120)])
def test_domains_of_one_source_differ_as_much_as_their_halves_say(counts: tuple[int, int]) -> None:
    """Over 200 pairs of domains; tokens drawn one by one would differ by a third of that."""
    generator = torch.Generator().manual_seed(0)
    pairs = [_documents(counts, generator) for _ in range(200)]
    measured = np.mean([float(pair.distance(0, 1)) for pair in pairs])
    assert np.mean([float(pair.distance_by_documents(0, 1)) for pair in pairs]) == pytest.approx(measured, rel=0.05)
    tokens = [40 * count for count in counts]
    independent = math.sqrt(2 / math.pi * 1 / 8 * 7 / 8 * (1 / tokens[0] + 1 / tokens[1])) * 8 / 2
    assert measured > 2.5 * independent


def test_a_domain_of_one_document_has_no_halves() -> None:
    assert _documents((1, 5), torch.Generator().manual_seed(0)).distance_by_documents(0, 1) is None


@settings(max_examples=15)
@given(seeds=seeds)
def test_cutoff_and_usage_of_every_batch(seeds: list[int]) -> None:
    seen = [random_observation(seed) for seed in seeds]
    threshold = torch.randn(LAYERS, EXPERTS, generator=torch.Generator().manual_seed(7))
    rates = [0.25, 0.5]
    result = CutoffUsage(threshold, rates)
    for observation in seen:
        result.update(observation)
    deviations, usages = [], []
    for observation in seen:
        tokens = tokens_of([observation])
        logits, masks = (np.array([t[name] for t in tokens]) for name in ("logits", "experts"))
        ranked = -np.sort(-logits, axis=0)
        cutoffs = [ranked[target_count(len(tokens), rate) - 1, layer] for layer, rate in enumerate(rates)]
        deviations.append(np.array(cutoffs) - threshold.numpy())
        usages.append(masks.mean(0) / np.array(rates)[:, None])
    moments = result.moments()
    np.testing.assert_allclose(moments["cutoff_deviation_mean"], np.mean(deviations, axis=0), atol=1e-6)
    np.testing.assert_allclose(moments["cutoff_deviation_std"], np.std(deviations, axis=0), atol=1e-3)
    np.testing.assert_allclose(moments["usage_mean"], np.mean(usages, axis=0), atol=1e-9)
    np.testing.assert_allclose(moments["usage_std"], np.std(usages, axis=0), atol=1e-6)
    kept = result.kept()
    np.testing.assert_allclose(kept[0], np.stack(deviations), atol=1e-6)
    np.testing.assert_allclose(kept[1], np.stack(usages), atol=1e-6)


def test_a_rest_of_a_batch_is_no_batch() -> None:
    """Of a few tokens the usage is noise, and it would weigh as much as that of a whole batch."""
    whole, rest = random_observation(1, padding=False), random_observation(2, batch=1, padding=False)
    alone, both, only_rest = (CutoffUsage(torch.zeros(LAYERS, EXPERTS), [0.25, 0.5]) for _ in range(3))
    alone.update(whole)
    for result, seen in ((both, whole), (both, rest), (only_rest, rest)):
        result.update(seen)
    assert both.num_batches == 1
    assert all(torch.equal(value, both.moments()[name]) for name, value in alone.moments().items())
    assert only_rest.num_batches == 1  # little text: better than nothing


def test_of_many_batches_a_bounded_number_of_evenly_spaced_ones_is_kept() -> None:
    result = CutoffUsage(None, [0.25, 0.5])
    batches = 5 * MOST_BATCHES + 3
    seen = [random_observation(seed, batch=1, padding=False) for seed in range(batches)]
    for observation in seen:
        result.update(observation)
    deviations, usages = result.kept()
    assert deviations is None
    assert MOST_BATCHES / 2 <= len(usages) <= MOST_BATCHES
    expected = [o.experts[0].double().mean(0) / torch.tensor([[0.25], [0.5]]) for o in seen[::8]]
    torch.testing.assert_close(usages, torch.stack(expected).float())
    assert result.num_batches == batches


@settings(max_examples=15)
@given(seeds=seeds)
def test_router_logits_are_counted_once_each(seeds: list[int]) -> None:
    seen = [random_observation(seed) for seed in seeds]
    threshold = torch.full((LAYERS, EXPERTS), 0.3)
    result = RouterLogits(threshold)
    for observation in seen:
        result.update(observation)
    logits = np.array([t["logits"] for t in tokens_of(seen)])  # [N, L, E]
    np.testing.assert_array_equal(result.above, (logits > np.float32(0.3)).sum(0))
    assert result.counts.shape == (LAYERS, EXPERTS, NUM_BINS)
    for layer in range(LAYERS):
        edges = result.edges[layer].numpy()
        first = np.array([t["logits"] for t in tokens_of(seen[:1])])[:, layer]
        assert edges[0] < first.min()
        assert edges[-1] > first.max()
        for expert in range(EXPERTS):
            inside = np.clip(logits[:, layer, expert], edges[0], np.nextafter(edges[-1], -np.inf))
            expected = np.histogram(inside, edges)[0]
            np.testing.assert_array_equal(result.counts[layer, expert], expected)


@settings(max_examples=10)
@given(seeds=st.lists(st.integers(0, 2**31), min_size=6, max_size=10, unique=True))
def test_intensity_per_vocabulary_entry_and_first_passages(seeds: list[int]) -> None:
    seen = [random_observation(seed, batch=8) for seed in seeds]
    result = Intensity(VOCABULARY)
    for observation in seen:
        result.update(observation)
    tokens = tokens_of(seen)
    of_token = {v: [int(np.sum(t["experts"])) for t in tokens if t["token"] == v] for v in range(VOCABULARY)}
    expected = [(v, len(f), sum(f) / len(f)) for v, f in of_token.items() if len(f) >= FEWEST_OCCURRENCES]
    assert result.ranked() == sorted(expected, key=lambda entry: (-entry[2], entry[0]))
    for domain, passage in result.passages.items():
        first = next(t["row"] for t in tokens if t["domain"] == domain)
        here = [t for t in tokens if t["row"] == first]
        assert passage.tokens.tolist() == [t["token"] for t in here]
        assert passage.experts.tolist() == [t["experts"] for t in here]
        assert passage.loss.tolist() == [t["loss"] for t in here]
