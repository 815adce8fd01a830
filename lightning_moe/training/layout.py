"""The check of the layout of processes before any process is started."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_moe.errors import UserError
from lightning_moe.internals.lightning import launches_by_command
from lightning_moe.model.expert_parallel import check_group_size
from lightning_moe.training.strategy import PROCESSES, FullyShardedStrategy

_RIGHT = "give auto (one process), ddp (--config trainer/ddp), or sharding by --config trainer/fsdp"
#: class name of a strategy → why it is refused
_REASONS = {
    "ModelParallelStrategy": "Lightning's default for it is tensor parallelism, which would train this model "
    "unsharded, without exchanging gradients",
    "FSDPStrategy": "it is the older FSDP, which needs a GPU and wraps the model otherwise",
    "DDPStrategy": "processes made by fork or spawn do not give the trained model back",
}


def check_layout(trainer: Trainer, global_batch_size: int, num_experts: int) -> None:
    """Check strategy, processes and accumulation of a trainer that is about to fit.

    Args:
        trainer: trainer, whose processes need not run yet.
        global_batch_size: sequences per optimizer step.
        num_experts: number of experts of each MoE layer; 0 for a dense model.

    Raises:
        UserError: the strategy is none of those that train this model right, the sequences of a step or the experts
            cannot be divided over the processes, or the accumulation changes during training.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    launched = isinstance(strategy, DDPStrategy) and launches_by_command(strategy)
    if not (launched or isinstance(strategy, SingleDeviceStrategy | FullyShardedStrategy)):
        raise UserError(f"trainer.strategy={name}: {_REASONS.get(name, 'not tried with this model')}; {_RIGHT}")

    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler) and len(set(callback.scheduling.values())) > 1:
            raise UserError(
                f"trainer.callbacks: GradientAccumulationScheduler with scheduling={callback.scheduling}: the number "
                "of accumulation steps decides which tokens share a micro-batch and must stay the same; use "
                "trainer.accumulate_grad_batches"
            )

    processes, accumulate = trainer.num_nodes * trainer.num_devices, trainer.accumulate_grad_batches
    if global_batch_size % (processes * accumulate):
        few = " There are more processes than sequences." if processes > global_batch_size else ""
        raise UserError(
            f"data.global_batch_size={global_batch_size}: the sequences of a step cannot be divided over {processes} "
            f"processes (trainer.devices={trainer.num_devices} × trainer.num_nodes={trainer.num_nodes}) × "
            f"trainer.accumulate_grad_batches={accumulate}.{few} It must be a multiple of {processes * accumulate}"
        )
    if isinstance(strategy, FullyShardedStrategy):
        check_group_size(strategy.expert_parallel_size, PROCESSES, processes)
        check_group_size(strategy.expert_parallel_size, "model.decoder.num_experts", num_experts)
