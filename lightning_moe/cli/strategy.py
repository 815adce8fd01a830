"""Fully sharded data parallelism (FSDP2), with sizes that follow from the number of processes."""

from __future__ import annotations

from datetime import timedelta

from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_moe.errors import UserError


class FullyShardedStrategy(ModelParallelStrategy):
    """ModelParallelStrategy whose data-parallel group is all processes that tensor parallelism leaves.

    Lightning's default makes every process of a node a tensor-parallel one; a model without tensor parallelism then
    trains unsharded, without any exchange of gradients and without an error.

    Args:
        tensor_parallel_size: processes that share each matrix.
        save_distributed_checkpoint: write a folder with one file per process instead of one file; only this strategy
            can read it back.
        process_group_backend: null lets Lightning choose for the device.
        timeout: of collective operations.
    """

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
    ) -> None:
        super().__init__(
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        processes, tensor_parallel = self.num_processes * self.num_nodes, int(self._tensor_parallel_size)
        if tensor_parallel < 1 or processes % tensor_parallel:
            raise UserError(
                f"trainer.strategy.init_args.tensor_parallel_size={tensor_parallel}: must divide the number of "
                f"processes, {processes}"
            )
        self._data_parallel_size = processes // tensor_parallel
        super().setup_environment()
