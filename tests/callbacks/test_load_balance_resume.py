"""Counts since the last logging are part of a checkpoint: what is logged next does not know of the interruption."""

import lightning.pytorch as pl
import torch
from helpers.foreign_module import ForeignModule, MemoryLogger, global_batches, make_trainer, micro_batches
from helpers.gloo_pair import GlooPair
from torch import Tensor

from lightning_moe.callbacks import LoadBalance, RoutingStateUpdate, ThresholdWarmup
from lightning_moe.routing import TokenChoice

State = dict[str, dict[str, Tensor]]


class Loads(pl.Callback):
    """Tokens of each expert of the first MoE layer, of this rank's micro-batches."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: ForeignModule, *args: object) -> None:
        record = pl_module.layers()[0].record
        assert record is not None
        self.steps.append(record.selection.mask.sum((0, 1)))


def train(
    steps: int, state: State | None = None, rank: int = 0, world_size: int = 1
) -> tuple[State, list[Tensor], float]:
    """State after the last step, the loads of each step, and the maximal load logged last (every third step)."""
    balance, loads, logger = LoadBalance(), Loads(), MemoryLogger()
    if state is not None:
        balance.load_state_dict(state)
    trainer = make_trainer(
        [ThresholdWarmup(), RoutingStateUpdate(), loads, balance],
        logger=logger,
        log_every_n_steps=3,
        strategy="auto" if world_size == 1 else "ddp",
        devices=world_size,
    )
    trainer.fit(ForeignModule(TokenChoice()), micro_batches(global_batches(steps), 1, rank, world_size))
    logged = [values["routing/layer_01/max_load"] for values in logger.logged.values() if "routing/max_load" in values]
    return balance.state_dict(), loads.steps, logged[-1]


def max_load(loads: list[Tensor]) -> float:
    load = torch.stack(loads).sum(0).double()
    return float(load.max() / load.mean())


def test_the_next_logging_counts_what_the_checkpoint_had(gloo_pair: GlooPair) -> None:
    state, loads, logged = train(5)
    assert torch.equal(state["layer_01"]["load"], loads[3] + loads[4])
    assert torch.equal(torch.tensor(logged), torch.tensor(max_load(loads[:3])).float())

    _, later, logged = train(3, state)
    assert torch.tensor(logged) == torch.tensor(max_load([*loads[3:], *later])).float()

    # two ranks: all of both is saved, and counted once
    (state, first, _), (other_state, second, _) = gloo_pair.run(train, [(5, None, rank, 2) for rank in (0, 1)])
    both = first[3] + first[4] + second[3] + second[4]
    assert torch.equal(state["layer_01"]["load"], both)
    assert torch.equal(other_state["layer_01"]["load"], both)
    (_, first, logged), (_, second, _) = gloo_pair.run(train, [(3, state, rank, 2) for rank in (0, 1)])
    assert torch.tensor(logged) == torch.tensor(max_load([both, *first, *second])).float()
