"""Loss, perplexity and bits per byte against float64; over batches and two processes."""

import math

import numpy as np
import pytest
import torch
from helpers.gloo_pair import GlooPair
from torch import Tensor

from lightning_moe.metrics.language_modeling import LanguageModelingMetric

TOKEN_BYTES = torch.tensor([0, 1, 2, 3, 5, 8])


def random_batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 6, (3, 9), generator=generator)
    labels[torch.rand(3, 9, generator=generator) < 0.2] = -100
    loss = torch.rand(3, 9, generator=generator) * 10
    return loss.masked_fill(labels == -100, 0.0), labels


def metric_of(batches: list[tuple[Tensor, Tensor]], token_bytes: Tensor | None = TOKEN_BYTES) -> dict[str, Tensor]:
    metric = LanguageModelingMetric()
    for loss, labels in batches:
        metric.update(loss, labels, token_bytes)
    return metric.compute()


def test_values_are_those_of_float64_sums() -> None:
    batches = [random_batch(seed) for seed in range(4)]
    losses = np.concatenate([loss.double().flatten().numpy() for loss, _ in batches])
    labels = np.concatenate([labels.flatten().numpy() for _, labels in batches])
    nll, tokens = losses[labels != -100].sum(), (labels != -100).sum()
    text_bytes = TOKEN_BYTES.numpy()[labels[labels != -100]].sum()
    values = metric_of(batches)
    assert values["loss"].item() == pytest.approx(nll / tokens, rel=1e-6)
    assert values["perplexity"].item() == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert values["bits_per_byte"].item() == pytest.approx(nll / math.log(2) / text_bytes, rel=1e-6)
    assert all(value.dtype == torch.float32 for value in values.values())


def test_without_byte_counts_there_are_no_bits_per_byte() -> None:
    assert metric_of([random_batch(0)], None).keys() == {"loss", "perplexity"}


def test_sums_stay_exact_in_a_module_that_is_converted() -> None:
    """As under the trainer's precision ``bf16-true``."""
    batches = [random_batch(seed) for seed in range(4)]
    owner = torch.nn.ModuleDict({"metric": LanguageModelingMetric()}).to(torch.bfloat16)
    for _ in range(2):
        for loss, labels in batches:
            owner["metric"].update(loss, labels, TOKEN_BYTES)
        assert all(torch.equal(value, metric_of(batches)[name]) for name, value in owner["metric"].compute().items())
        owner["metric"].reset()


def test_long_sums_do_not_lose_small_losses() -> None:
    """fp32 sums would stop growing: 2^24 + 1 = 2^24 there."""
    metric = LanguageModelingMetric()
    metric.update(torch.full((1, 1), 2.0**24), torch.zeros(1, 1, dtype=torch.int64))
    for _ in range(64):
        metric.update(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64))
    assert metric.compute()["loss"].item() == pytest.approx((2**24 + 64) / 65, rel=1e-7)


def test_two_processes_count_together(gloo_pair: GlooPair) -> None:
    """Weighted by tokens, not a mean of means."""
    batches = [random_batch(seed) for seed in range(5)]
    alone = metric_of(batches)
    for values in gloo_pair.run(metric_of, [(batches[:1],), (batches[1:],)]):
        for name, value in alone.items():
            assert values[name].item() == pytest.approx(value.item(), rel=1e-6)
