"""Muon and AdamW on parameters that are sharded over ranks take the step of one process."""

import torch
import torch.distributed as dist
from helpers.gloo_pair import GlooPair
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor

from lightning_moe.optim import MuonAdamW

SHAPES = [(1, 6), (3, 6), (3, 6), (3, 4, 6), (4, 4, 6), (4, 4, 6)]  # fewer rows than ranks, uneven ones, stacks
ADAMW = [(1, 6), (3,)]


def step_twice(placements: list[tuple[Placement, ...]] | None) -> list[Tensor]:
    """The parameters after two steps, whole; ``placements`` of each of them over all ranks."""
    generator = torch.Generator().manual_seed(0)
    draws = [[torch.randn(shape, generator=generator) for _ in range(3)] for shape in SHAPES + ADAMW]
    if placements is not None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        draws = [[distribute_tensor(t, mesh, p) for t in of_one] for of_one, p in zip(draws, placements, strict=True)]
    parameters = [nn.Parameter(of_one[0]) for of_one in draws]
    groups = [
        {"params": parameters[:3], "rule": "muon", "lr": 0.1, "output_dim": -2},
        {"params": parameters[3:6], "rule": "muon", "lr": 0.1, "output_dim": -1, "weight_decay": 0.1},
        {"params": parameters[6:], "rule": "adamw", "lr": 0.1, "weight_decay": 0.1},
    ]
    optimizer = MuonAdamW(groups, torch.float32)
    for step in (1, 2):
        for parameter, of_one in zip(parameters, draws, strict=True):
            parameter.grad = of_one[step].clone()
        optimizer.step()
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in parameters]


def test_sharded_matrices_and_stacks_take_the_step_of_one_process(gloo_pair: GlooPair) -> None:
    expected = step_twice(None)
    by_rows_and_experts = [(Shard(0),)] * len(SHAPES + ADAMW)
    inside_the_experts = [(Shard(0),)] * 3 + [(Shard(1),)] * 3 + [(Shard(0),)] * 2
    for placements in (by_rows_and_experts, inside_the_experts):
        for found in gloo_pair.run(step_twice, [(placements,)] * 2):
            for tensor, other in zip(found, expected, strict=True):
                torch.testing.assert_close(tensor, other, rtol=0, atol=1e-6)
