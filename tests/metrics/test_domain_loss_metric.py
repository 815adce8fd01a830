"""The loss of each domain against a loop over tokens in float64; over batches and two processes."""

import math

import pytest
import torch
from helpers.gloo_pair import GlooPair
from torch import Tensor

from lightning_moe.metrics.domain_loss import DomainLossMetric

NAMES = ["code", "prose", "songs"]
Batch = tuple[Tensor, Tensor]


def random_batch(seed: int, domains: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    loss = torch.rand(3, 9, generator=generator) * 10
    numbers = torch.randint(0, domains, (3, 9), generator=generator)
    return loss, numbers.masked_fill(torch.rand(3, 9, generator=generator) < 0.2, -100)


def metric_of(batches: list[Batch]) -> dict[str, float]:
    metric = DomainLossMetric(NAMES)
    for batch in batches:
        metric.update(*batch)
    return {name: value.item() for name, value in metric.compute().items()}


def reference(batches: list[Batch]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for loss, domains in batches:
        for nats, domain in zip(loss.flatten().tolist(), domains.flatten().tolist(), strict=True):
            if domain != -100:
                values.setdefault(f"domain_loss/{NAMES[domain]}", []).append(nats)
    return {name: math.fsum(of_domain) / len(of_domain) for name, of_domain in values.items()}


def test_values_are_those_of_a_loop_over_tokens() -> None:
    batches = [random_batch(seed) for seed in range(4)]
    assert metric_of(batches) == pytest.approx(reference(batches), rel=1e-6)


def test_a_domain_without_a_token_has_no_value() -> None:
    batches = [random_batch(seed, domains=2) for seed in range(2)]
    assert metric_of(batches).keys() == {"domain_loss/code", "domain_loss/prose"}


def test_a_loss_that_is_no_number_stays_in_its_domain() -> None:
    loss, domains = random_batch(0)
    values = metric_of([(loss.masked_fill(domains == 1, math.nan), domains)])
    assert math.isnan(values.pop("domain_loss/prose"))
    assert values == pytest.approx({name: reference([(loss, domains)])[name] for name in values}, rel=1e-6)


def test_sums_stay_exact_in_a_module_that_is_converted() -> None:
    """As under the trainer's precision ``bf16-true``; fp32 sums would lose the small losses: 2^24 + 1 = 2^24 there."""
    owner = torch.nn.ModuleDict({"metric": DomainLossMetric(NAMES)}).to(torch.bfloat16)
    batches = [(torch.full((1, 1), value), torch.ones(1, 1, dtype=torch.int64)) for value in [2.0**24] + [1.0] * 64]
    for batch in batches:
        owner["metric"].update(*batch)
    assert owner["metric"].compute()["domain_loss/prose"].item() == pytest.approx((2**24 + 64) / 65, rel=1e-7)


def test_adding_a_batch_waits_for_no_value() -> None:
    """On an accelerator the host would wait for one; tensors without values cannot give any."""
    metric = DomainLossMetric(NAMES).to("meta")
    metric.update(torch.empty(3, 9, device="meta"), torch.empty(3, 9, device="meta", dtype=torch.int64))
    assert metric.nll.dtype == torch.float64


def test_two_processes_count_together(gloo_pair: GlooPair) -> None:
    """Weighted by tokens, not a mean of means; one of them has not seen every domain."""
    batches = [random_batch(0, domains=1), *(random_batch(seed) for seed in range(1, 5))]
    for values in gloo_pair.run(metric_of, [(batches[:1],), (batches[1:],)]):
        assert values == pytest.approx(reference(batches), rel=1e-6)
