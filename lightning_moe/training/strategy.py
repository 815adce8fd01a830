"""Fully sharded data parallelism (FSDP2), with sizes that follow from the number of processes."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_moe.checkpoints.checksums import write_checksums
from lightning_moe.errors import UserError
from lightning_moe.internals.lightning import saves_sharded, set_data_parallel_size
from lightning_moe.model.expert_parallel import EXPERTS, REPLICAS, check_group_size

PROCESSES = "trainer.devices × trainer.num_nodes"


class FullyShardedStrategy(ModelParallelStrategy):
    """ModelParallelStrategy in which all processes are data parallel.

    By Lightning's default all processes of a node are tensor parallel. A model without tensor parallelism then trains
    unsharded, without any exchange of gradients and without an error.

    Args:
        expert_parallel_size: number of processes that share the experts of each layer (`model.expert_parallel`); it
            must divide the numbers of processes and of experts. All else is sharded over all processes.
        save_distributed_checkpoint: whether to write a folder with a file per process, and checksums, or one file.
        process_group_backend: backend of torch; null lets Lightning choose for the device.
        timeout: longest wait in a collective operation.
    """

    def __init__(
        self,
        expert_parallel_size: int = 1,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
    ) -> None:
        backends = dist.Backend.backend_list
        if process_group_backend not in (None, *backends):
            raise UserError(
                f"trainer.strategy.init_args.process_group_backend={process_group_backend!r}: must be one of "
                f"{', '.join(backends)}, or null"
            )
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.expert_parallel_size = expert_parallel_size
        self.expert_mesh: DeviceMesh | None = None  # see `model.expert_parallel.distribute_experts`

    def setup_environment(self) -> None:
        processes, group = self.num_processes * self.num_nodes, self.expert_parallel_size
        check_group_size(group, PROCESSES, processes)
        set_data_parallel_size(self, processes)
        super().setup_environment()
        if group > 1:
            shape = (processes // group, group)
            self.expert_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=(REPLICAS, EXPERTS))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if not saves_sharded(self):
            return super().save_checkpoint(checkpoint, filepath, storage_options)
        folder, problem = Path(self.broadcast(filepath)), None
        try:
            super().save_checkpoint(checkpoint, folder, storage_options)
        except OSError as error:  # of the first process, which alone writes the header
            problem = str(error)
        write_checksums(folder, problem)
