"""Training on the device: the same in every layout of one process, in the expert-parallel path, and after a stop."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.foreign_module import ForeignModule, global_batches, make_trainer, micro_batches
from helpers.small_run import Command
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_moe.callbacks import FiniteGuard, LoadBalance, RoutingStateUpdate, ThresholdWarmup
from lightning_moe.data.delivery import Delivery
from lightning_moe.model.experts import Experts
from lightning_moe.routing import ExpertThreshold, QuantileBalancing, RoutingRule, TokenChoiceLossFree

pytestmark = pytest.mark.gpu
STEPS = 6
RULES = {
    "ET": ExpertThreshold(ema_decay=0.9, capacity_factor=None),
    "loss_free": TokenChoiceLossFree(bias_update_rate=0.05),
    "QB": QuantileBalancing(ema_decay=0.5),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "four passes": {"accumulate": 4},
    "recomputed": {"activation_checkpointing": True},
    "compiled": {"compile": True},
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
}


def train(
    rule: RoutingRule, accelerator: dict[str, Any], strategy: str = "auto", accumulate: int = 1, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of each step, and the routing state at the end."""
    module = ForeignModule(rule, **options)
    fsdp = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    trainer = make_trainer(
        [ThresholdWarmup(), FiniteGuard(), RoutingStateUpdate(), LoadBalance()],
        strategy=fsdp if strategy == "fsdp" else strategy, accumulate_grad_batches=accumulate, **accelerator,
    )  # fmt: skip
    trainer.fit(module, micro_batches(global_batches(STEPS), accumulate))
    state = {name: buffer.cpu() for name, buffer in module.named_buffers() if "state." in name}
    return torch.tensor(module.losses).view(STEPS, accumulate).mean(1), state


@pytest.mark.parametrize(
    ("rule", "layout"), [(rule, layout) for rule in RULES for layout in LAYOUTS if layout != "compiled" or rule == "ET"]
)
def test_every_layout_trains_the_same(rule: str, layout: str, accelerator: dict[str, Any], alone: None) -> None:
    losses, state = train(RULES[rule], accelerator)
    found, found_state = train(RULES[rule], accelerator, **LAYOUTS[layout])
    torch.testing.assert_close(found, losses, rtol=0, atol=1e-3)
    assert losses[-1] < losses[0]
    assert len(state) >= 2
    for name, buffer in state.items():
        torch.testing.assert_close(found_state[name], buffer, rtol=0, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_processes_of_one_gpu_speak_nccl(accelerator: dict[str, Any], alone: None, device: torch.device) -> None:
    train(RULES["ET"], accelerator, "ddp")
    assert dist.get_backend() == ("nccl" if device.type == "cuda" else "gloo")


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_experts_on_one_rank_are_the_experts(
    activation: str, device: torch.device, alone: None, monkeypatch: Any
) -> None:
    """The exchange between ranks, with one rank: tokens travel to themselves."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    store = dist.HashStore()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    experts = Experts(4, 16, 24, activation).to(device)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, gates = torch.randn(64, 16, device=device), torch.rand(64, 4, device=device)
    mask = torch.rand(64, 4, device=device) < 0.4

    def outputs_and_gradients() -> list[Tensor]:
        experts.zero_grad()
        leaves = [tensor.clone().requires_grad_() for tensor in (x, gates)]
        y = experts(leaves[0], mask, leaves[1])
        y.square().sum().backward()
        return [y.detach(), *(leaf.grad for leaf in leaves), *(parameter.grad for parameter in experts.parameters())]

    expected = outputs_and_gradients()
    monkeypatch.setattr("lightning_moe.model.experts.expert_group", lambda weight: dist.group.WORLD)
    for found, wanted in zip(outputs_and_gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("routing", ["expert_threshold", "token_choice_loss_free"])
def test_resuming_equals_not_having_stopped(routing: str, command: Command, flags: tuple[str, ...]) -> None:
    options = ("--config=small", *flags, f"--config=routing/{routing}", "--threshold_warmup.steps=2")
    options += (
        "--trainer.enable_progress_bar=false",
        "--trainer.val_check_interval=3",
        "--trainer.log_every_n_steps=1",
    )

    def weights(run: str) -> dict[str, Tensor]:
        content: dict[str, Tensor] = torch.load(f"runs/{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        return content

    for name, extra in (
        ("whole", ("--trainer.max_steps=6",)),
        ("again", ("--trainer.max_steps=6",)),
        ("parts", ("--trainer.max_steps=3",)),
        ("parts", ("--trainer.max_steps=6", "--ckpt_path=last")),
    ):
        code, _, err = command("fit", *options, f"--run_name={name}", *extra)
        assert code == 0, err
    whole = weights("whole")
    for other in (weights("again"), weights("parts")):
        assert all(torch.equal(other[name], tensor) for name, tensor in whole.items())


def test_batches_for_a_gpu_are_pinned_and_one_ahead(gpu: torch.device) -> None:
    batches = [{"input_ids": torch.full((2, 2), number)} for number in range(5)]
    for number, batch in enumerate(Delivery(gpu, ahead=True).deliver(batches)):
        assert batch["input_ids"].is_pinned()
        assert int(batch["input_ids"].to(gpu, non_blocking=True).sum()) == 4 * number
