"""A model that this machine cannot hold is refused before it is built, and counting draws no random numbers."""

import os
import re

import pytest
import torch
from helpers.small_run import Command

from lightning_moe.errors import UserError
from lightning_moe.model import DecoderConfig, model_size
from lightning_moe.module import LanguageModel
from lightning_moe.routing import ExpertThreshold


def test_a_model_too_large_for_the_machine() -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    vocabulary = memory // (4 * 2 * 64)  # embedding and head have exactly this much, the blocks come on top
    with pytest.raises(UserError) as refused:
        LanguageModel(DecoderConfig(vocab_size=vocabulary, hidden_size=64, num_layers=1, num_dense_layers=1))
    found = re.search(
        r"([\d,]+) parameters take ([\d,.]+) GiB in fp32, but this machine has ([\d,.]+) GiB", str(refused.value)
    )
    assert found is not None
    parameters, needed, present = (float(text.replace(",", "")) for text in found.groups())
    assert parameters > 2 * 64 * vocabulary
    assert needed == pytest.approx(parameters * 4 / 2**30, abs=0.06)
    assert present == pytest.approx(memory / 2**30, abs=0.06)


def test_a_weight_without_number(command: Command) -> None:
    code, _, err = command("fit", "--config=small", "--model.decoder.expert_hidden_size=2147483647",
                           "--model.decoder.num_experts=1048576", "--model.decoder.hidden_size=32768")  # fmt: skip
    assert code == 2
    assert err.startswith("error: model.decoder: ")


def test_counting_draws_no_random_numbers() -> None:
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    model_size(DecoderConfig(), ExpertThreshold())
    assert torch.equal(torch.rand(5), expected)
