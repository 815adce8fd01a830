"""Loads and fanout against a recount with numpy; over batches, padding, capacity and two processes."""

import numpy as np
import pytest
import torch
from helpers.gloo_pair import GlooPair
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.metrics.load_balance import LoadBalanceMetric
from lightning_moe.routing import Selection


def random_selection(seed: int, share: float, experts: int = 5, capacity: bool = False) -> Selection:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 7, experts, generator=generator) < share
    if not capacity:
        return Selection(mask)
    dropped, added = (torch.randint(0, 4, (experts,), generator=generator) for _ in range(2))
    return Selection(mask, dropped, added.minimum(mask.sum((0, 1))), lower_bound=3)


def recount(masks: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Of masks [n, E]."""
    mask = np.concatenate(masks).astype(np.int64)
    load, fanout = mask.sum(0), mask.sum(1)
    return {
        "load": load,
        "max_load": load.max() / load.mean(),
        "load_cv": load.std() / load.mean(),
        "dead_experts": (load == 0).sum(),
        "fanout_mean": load.sum() / len(mask),
        "fanout_0_share": (fanout == 0).mean(),
        "fanout_1_share": (fanout == 1).mean(),
        "fanout_2plus_share": (fanout >= 2).mean(),
    }


def assert_counts(values: dict[str, torch.Tensor], expected: dict[str, np.ndarray]) -> None:
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(values[name].numpy(), value, rtol=1e-6, err_msg=name)


@given(
    seeds=st.lists(st.integers(0, 2**31), min_size=1, max_size=3),
    share=st.sampled_from([0.1, 0.5, 1.0]),
    padding=st.sampled_from([None, 0.3, 1.0]),
)
def test_values_are_those_of_a_recount(seeds: list[int], share: float, padding: float | None) -> None:
    metric, kept = LoadBalanceMetric(5), []
    for seed in seeds:
        selection = random_selection(seed, share)
        selection.mask[0, 0, 0] = True  # some load, so that the ratios exist
        if padding is None:
            metric.update(selection)
            kept.append(selection.mask.flatten(0, 1).numpy())
        else:
            valid = torch.rand(2, 7, generator=torch.Generator().manual_seed(seed + 1)) > padding
            valid[0, 0] = True
            metric.update(selection, valid)
            kept.append(selection.mask[valid].numpy())
    assert_counts(metric.compute(), recount(kept))


@given(seeds=st.lists(st.integers(0, 2**31), min_size=1, max_size=3))
def test_capacity_rates_are_shares_of_the_selected_and_of_the_guaranteed(seeds: list[int]) -> None:
    metric = LoadBalanceMetric(5)
    selected = dropped = added = guaranteed = 0
    for seed in seeds:
        selection = random_selection(seed, 0.4, capacity=True)
        metric.update(selection)
        # what was above the threshold before the bounds acted
        selected += int(selection.mask.sum() + selection.num_dropped.sum() - selection.num_added.sum())
        dropped += int(selection.num_dropped.sum())
        added += int(selection.num_added.sum())
        guaranteed += 3 * 5
    values = metric.compute()
    assert values["saturation_rate"].item() == pytest.approx(dropped / max(selected, 1))
    assert values["starvation_rate"].item() == pytest.approx(added / guaranteed)


def test_no_token_selected_at_all_gives_numbers() -> None:
    metric = LoadBalanceMetric(4)
    metric.update(Selection(torch.zeros(1, 6, 4, dtype=torch.bool)))
    values = metric.compute()
    assert values["dead_experts"] == 4
    assert values["fanout_0_share"] == 1
    assert all(value.isfinite().all() for value in values.values())


def metric_of(masks: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    metric = LoadBalanceMetric(5)
    for mask in masks:
        metric.update(Selection(mask, torch.ones(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64), 2))
    return metric.compute()


def test_two_processes_count_together(gloo_pair: GlooPair) -> None:
    masks = [random_selection(seed, 0.3).mask for seed in range(5)]
    alone = metric_of(masks)
    for values in gloo_pair.run(metric_of, [(masks[:2],), (masks[2:],)]):
        assert values.keys() == alone.keys()
        assert all(torch.equal(values[name], alone[name]) for name in alone)
