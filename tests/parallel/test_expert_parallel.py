"""Experts on several ranks: outputs, gradients and training are those of one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.foreign_module import MemoryLogger, global_batches, make_trainer, micro_batches, tiny_config
from helpers.gloo_pair import GlooPair
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lightning_moe.callbacks import FiniteGuard, LoadBalance, RoutingStateUpdate, ThresholdWarmup
from lightning_moe.errors import UserError
from lightning_moe.model import Decoder, next_token_loss
from lightning_moe.model.expert_parallel import EXPERTS, REPLICAS, distribute_experts, routed_experts_over_ranks
from lightning_moe.model.pairs import sort_pairs
from lightning_moe.module import LanguageModel
from lightning_moe.optim import OptimizerConfig, ScheduleConfig, clip_by_global_norm
from lightning_moe.routing import ExpertChoice, ExpertThreshold
from lightning_moe.training.strategy import FullyShardedStrategy

RULE = ExpertThreshold(ema_decay=0.9, capacity_factor=None)
TOKENS, EXPERT_COUNT, WIDTH, HIDDEN = 7, 4, 6, 5


# --- the exchange


def operands(activation: str) -> dict[str, Tensor]:
    """Inputs of both ranks, weights of all experts and the output's cotangent, in float64."""
    generator = torch.Generator().manual_seed(3)
    new = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weights = {"up": new(EXPERT_COUNT, WIDTH, HIDDEN), "down": new(EXPERT_COUNT, HIDDEN, WIDTH)}
    if activation == "swiglu":
        weights["gate"] = new(EXPERT_COUNT, WIDTH, HIDDEN)
    of_ranks = {"x": new(2, TOKENS, WIDTH), "gates": new(2, TOKENS, EXPERT_COUNT), "dy": new(2, TOKENS, WIDTH)}
    return {**of_ranks, **weights}


def on_rank(rank: int, activation: str, masks: Tensor) -> dict[str, Tensor]:
    """This rank's outputs and gradients."""
    tensors = operands(activation)
    per_rank = EXPERT_COUNT // 2
    here = slice(rank * per_rank, (rank + 1) * per_rank)
    leaves = {name: tensors[name][rank].clone().requires_grad_() for name in ("x", "gates")}
    leaves |= {n: tensors[n][here].clone().requires_grad_() for n in ("up", "gate", "down") if n in tensors}
    pairs = sort_pairs(masks[rank])
    pair_gates = leaves["gates"].t().reshape(-1)[pairs.cell]
    up, gate, down = leaves["up"], leaves.get("gate"), leaves["down"]
    y = routed_experts_over_ranks(leaves["x"], pair_gates, pairs, up, gate, down, dist.group.WORLD)
    y.backward(tensors["dy"][rank])
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


def reference(activation: str, masks: Tensor) -> list[dict[str, Tensor]]:
    """Every token through every expert, weighted by the mask; on one process."""
    tensors = operands(activation)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items() if name != "dy"}
    hidden = torch.einsum("rtd,edf->rtef", leaves["x"], leaves["up"])
    if activation == "swiglu":
        hidden = torch.nn.functional.silu(torch.einsum("rtd,edf->rtef", leaves["x"], leaves["gate"])) * hidden
    else:
        hidden = hidden.relu().square()
    y = torch.einsum("rtef,efd,rte->rtd", hidden, leaves["down"], leaves["gates"] * masks)
    y.backward(tensors["dy"])
    results = []
    for rank in (0, 1):
        here = slice(rank * EXPERT_COUNT // 2, (rank + 1) * EXPERT_COUNT // 2)
        own = {name: leaves[name].grad[rank] for name in ("x", "gates")}
        own |= {name: leaves[name].grad[here] for name in ("up", "gate", "down") if name in leaves}
        results.append({"y": y[rank].detach(), **own})
    return results


def mask_of(case: str) -> Tensor:
    """bool [2, TOKENS, EXPERT_COUNT]"""
    mask = torch.rand(2, TOKENS, EXPERT_COUNT, generator=torch.Generator().manual_seed(1)) < 0.4
    if case == "all to rank 1":
        mask[..., :2] = False
    elif case == "rank 0 sends nothing":
        mask[0] = False
    elif case == "nothing at all":
        mask[:] = False
    elif case == "one expert is empty":
        mask[..., 2] = False
    elif case == "everything":
        mask[:] = True
    return mask


CASES = ["random", "all to rank 1", "rank 0 sends nothing", "nothing at all", "one expert is empty", "everything"]


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@pytest.mark.parametrize("case", CASES)
def test_tokens_travel_to_experts_and_gradients_come_back(gloo_pair: GlooPair, case: str, activation: str) -> None:
    masks = mask_of(case)
    found = gloo_pair.run(on_rank, [(rank, activation, masks) for rank in (0, 1)])
    for here, there in zip(found, reference(activation, masks), strict=True):
        assert here.keys() == there.keys()
        for name, tensor in there.items():
            torch.testing.assert_close(here[name], tensor, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


# --- the gradients of a model


def decoder() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(tiny_config(), ExpertChoice(pool="sequence"))  # not of a batch, however it is split
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def gradients(model: Decoder, micro: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of the mean loss over the micro-batches, before any optimizer: both of ours forget a gradient's scale."""
    for batch in micro:
        last = batch is micro[-1]
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(last, recurse=False)
        (next_token_loss(model(batch["input_ids"]).logits, batch["labels"]).mean() / len(micro)).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
    return {name: tensor.clone() for name, tensor in whole.items()}


def sharded_gradients(rank: int, world_size: int, group: int) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Gradients of all parameters; their norm; and the gradients clipped to a tenth of it."""
    model = decoder()
    mesh = init_device_mesh("cpu", (world_size // group, group), mesh_dim_names=(REPLICAS, EXPERTS))
    for layer in model.moe_layers():
        distribute_experts(layer.experts, mesh)
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    loader = micro_batches(global_batches(1), 2, rank, world_size)
    found = gradients(model, list(loader))
    norm = clip_by_global_norm(model.parameters(), float(total_norm(found)) / 10)
    return found, norm, {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def total_norm(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([grad.flatten() for grad in grads.values()]).norm()


def assert_gradients_of_one_process(ranks: list[Any]) -> None:
    expected = gradients(decoder(), global_batches(1))
    assert all(grad.abs().max() > 1e-4 for grad in expected.values())
    for found, norm, clipped in ranks:
        torch.testing.assert_close(norm, total_norm(expected), rtol=1e-5, atol=0)
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
            torch.testing.assert_close(clipped[name], grad / 10, rtol=1e-4, atol=1e-7)


def test_gradients_and_their_norm_are_those_of_one_process(gloo_pair: GlooPair) -> None:
    assert_gradients_of_one_process(gloo_pair.run(sharded_gradients, [(rank, 2, 2) for rank in (0, 1)]))


class GlooFour(GlooPair):
    world_size = 4


@pytest.mark.slow
def test_gradients_with_two_replicas_of_two_groups() -> None:
    """4 processes: each expert is on one rank of a group, and its replicas are sharded over the two groups."""
    with GlooFour() as four:
        assert_gradients_of_one_process(four.run(sharded_gradients, [(rank, 4, 2) for rank in range(4)]))


# --- training


def train(rank: int, group: int, world_size: int, steps: int, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    decoder_options = {key: options.pop(key) for key in ("activation_checkpointing", "activation") if key in options}
    accumulate = options.get("accumulate_grad_batches", 1)
    module = LanguageModel(
        tiny_config(**decoder_options), RULE, OptimizerConfig(), ScheduleConfig(adamw_warmup_steps=1)
    )
    logger = MemoryLogger()
    trainer = make_trainer(
        [ThresholdWarmup(), FiniteGuard(), RoutingStateUpdate(), LoadBalance()],
        strategy="auto" if world_size == 1 else FullyShardedStrategy(expert_parallel_size=group),
        devices=world_size,
        logger=logger,
        log_every_n_steps=1,
        **options,
    )
    batches = micro_batches(global_batches(steps), accumulate, rank, world_size)
    trainer.fit(module, batches, micro_batches(global_batches(2), 1, rank, world_size))
    logged = list(logger.logged.values())
    return {
        "train": [values["train/loss"] for values in logged if "train/loss" in values],
        "val": [values["val/loss"] for values in logged if "val/loss" in values],
        "state": {name: buffer.clone() for name, buffer in module.named_buffers() if ".state." in name},
        "local": [layer.experts.up.to_local().shape[0] for layer in module.decoder.moe_layers() if world_size > 1],
    }


def run(pair: GlooPair, steps: int, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """One process's results, and those of two ranks with half of the experts each."""
    first, second = pair.run(_train_with, [(rank, 2, 2, steps, options) for rank in (0, 1)])
    assert first["local"] == second["local"] == [2, 2]
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"])
    return train(0, 1, 1, steps, **options), first


def _train_with(rank: int, group: int, world_size: int, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    return train(rank, group, world_size, steps, **options)


def assert_trains_alike(one: dict[str, Any], other: dict[str, Any], steps: int) -> None:
    assert len(one["train"]) == steps
    assert other["train"] == pytest.approx(one["train"], abs=1e-4)
    assert other["val"] == pytest.approx(one["val"], abs=1e-4)
    assert any("threshold" in name for name in one["state"])
    for name, tensor in one["state"].items():
        torch.testing.assert_close(other["state"][name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_training_with_clipping_is_that_of_one_process(gloo_pair: GlooPair) -> None:
    one, other = run(gloo_pair, 5, gradient_clip_val=0.05)
    assert_trains_alike(one, other, 5)


@pytest.mark.slow
def test_twenty_steps_are_those_of_one_process(gloo_pair: GlooPair) -> None:
    one, other = run(gloo_pair, 20)
    assert_trains_alike(one, other, 20)
    assert one["train"][-1] < one["train"][0] - 0.5


@pytest.mark.slow
def test_accumulation_recomputation_and_swiglu(gloo_pair: GlooPair) -> None:
    options = {"accumulate_grad_batches": 2, "activation_checkpointing": True, "activation": "swiglu"}
    assert_trains_alike(*run(gloo_pair, 5, **options), 5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision_trains(gloo_pair: GlooPair, precision: str) -> None:
    """Within the rounding of bfloat16."""
    one, other = run(gloo_pair, 5, precision=precision)
    assert other["train"] == pytest.approx(one["train"], abs=2e-2)


# --- refused


def fit_with(rank: int, size: int) -> str:
    module = LanguageModel(tiny_config(num_experts=5), RULE)
    trainer = make_trainer([], strategy=FullyShardedStrategy(expert_parallel_size=size), devices=2, max_steps=1)
    try:
        trainer.fit(module, micro_batches(global_batches(1), 1, rank, 2))
    except UserError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("size", "why"),
    [
        (2, "expert_parallel_size=2: must divide model.decoder.num_experts=5"),
        (3, "expert_parallel_size=3: must divide trainer.devices × trainer.num_nodes=2"),
        (0, "expert_parallel_size=0: must divide trainer.devices × trainer.num_nodes=2"),
    ],
)
def test_groups_that_do_not_divide_are_refused(gloo_pair: GlooPair, size: int, why: str) -> None:
    assert gloo_pair.run(fit_with, [(0, size), (1, size)]) == [f"trainer.strategy.init_args.{why}"] * 2
