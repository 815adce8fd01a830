"""A training step on the device: how much memory it takes at its peak, and that the host does not wait in it."""

from dataclasses import replace

import pytest
import torch

from benchmarks.measurement import host_waits, peak_memory
from benchmarks.setup import PRESETS, RULES, Setup, decoder, training_step
from lightning_moe.optim import OptimizerConfig
from lightning_moe.plan import memory_plan, saved_activations

pytestmark = pytest.mark.gpu
#: all have a bound on the number of pairs that is known before the scores
WITHOUT_WAITS = ("dense", "token choice", "quantile balancing", "expert choice", "expert threshold")
#: GB of a d12 step of 16,384 tokens, with the loss in chunks
LARGEST_D12 = 15.0


@pytest.mark.parametrize("name", WITHOUT_WAITS)
def test_the_host_does_not_wait_in_a_step(name: str, device: torch.device) -> None:
    setup = Setup(
        hidden_size=64, num_tokens=512, sequence_length=128, vocab_size=64, num_experts=8, num_layers=3,
        precision="bf16-mixed", device=device,
    )  # fmt: skip
    step = training_step(decoder(setup, RULES[name]), setup)
    for _ in range(3):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert host_waits(step, device) == 0


@pytest.mark.parametrize("name", ["dense", "token choice", "expert threshold"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_peak_is_not_above_the_plan(name: str, precision: str, device: torch.device) -> None:
    """Without scratch memory of kernels, for which there is a tenth, and 100 MB on a GPU (workspaces of cuBLAS)."""
    setup = Setup(
        hidden_size=128, num_tokens=2048, sequence_length=256, vocab_size=512, num_experts=8, num_layers=3,
        precision=precision, device=device,
    )  # fmt: skip
    config, rule = replace(setup.config(), max_sequence_length=256), RULES[name]
    optimizer = OptimizerConfig(matrix_rule="adamw")
    saved = saved_activations(config, rule, setup.batch_shape[0], precision)
    plan = memory_plan(config, rule, optimizer, saved, precision, "single", 1)
    step = training_step(decoder(setup, rule), setup)
    step()  # makes gradients and optimizer state
    held = plan.parameters + plan.gradients + plan.optimizer
    spare = 100e6 if device.type == "cuda" else 0
    assert peak_memory(step, device) + held <= 1.1 * plan.total(False) + plan.gradients + spare


def test_a_d12_step_fits(gpu: torch.device) -> None:
    setup = replace(PRESETS["d12"], device=gpu, precision="bf16-mixed")
    if torch.cuda.get_device_properties(gpu).total_memory < 40e9:
        pytest.skip("this GPU has less than 40 GB, which is not enough to see how much a d12 step takes")
    step = training_step(decoder(setup, RULES["expert threshold"]), setup)
    for _ in range(2):
        step()
    torch.cuda.reset_peak_memory_stats(gpu)
    step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated(gpu) / 1e9 <= LARGEST_D12
