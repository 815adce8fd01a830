"""Advice of Lightning that contradicts a decision of ours is not printed; other messages are."""

import logging

import pytest
import torch
from lightning.fabric.accelerators import cuda
from lightning.pytorch.utilities import rank_zero_info

from lightning_moe.training.quiet import quiet


def test_the_advice_to_round_fp32_products_is_not_printed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As Lightning's accelerator gives it, on a machine that seems to have tensor cores."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(cuda, "_is_ampere_or_later", lambda device: True)
    quiet()
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        cuda._check_cuda_matmul_precision(torch.device("cuda", 0))
        rank_zero_info("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
