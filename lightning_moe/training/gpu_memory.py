"""What a run takes of the memory of each GPU, and what makes it less, by the numbers of ``plan``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn

from lightning_moe.errors import MemoryRanOut, UserError
from lightning_moe.model import Decoder
from lightning_moe.module import LanguageModel
from lightning_moe.optim import OptimizerConfig
from lightning_moe.plan import STRATEGIES, memory_plan, saved_activations
from lightning_moe.plan.memory import MemoryPlan, Strategy
from lightning_moe.plan.saved import PRECISIONS
from lightning_moe.routing import RoutingRule, rule_from_config
from lightning_moe.training.strategy import FullyShardedStrategy

GB = 1e9


@dataclass(frozen=True)
class RunMemory:
    """A run, as far as it decides the memory of one device.

    Args:
        decoder: model of the run.
        rule: routing rule of its MoE layers; `None` for a dense one.
        optimizer: rules and rates of the run.
        global_batch_size: sequences of an optimizer step.
        precision: precision of the trainer.
        strategy: strategy in the words of ``plan``.
        devices: number of devices.
        passes: forward and backward passes of an optimizer step on each device.
        checkpointing: whether activations are computed again.
        expert_parallel_size: number of devices that share the experts.
    """

    decoder: Decoder
    rule: RoutingRule | None
    optimizer: OptimizerConfig
    global_batch_size: int
    precision: str
    strategy: Strategy
    devices: int
    passes: int
    checkpointing: bool
    expert_parallel_size: int = 1

    @classmethod
    def of(cls, trainer: Trainer, model: LanguageModel, global_batch_size: int) -> RunMemory | None:
        """Return the memory of a run that is about to fit; `None` if ``plan`` does not know its precision or model."""
        if str(trainer.precision) not in PRECISIONS or not isinstance(model.decoder, Decoder):
            return None
        strategy, group, name = trainer.strategy, 1, STRATEGIES[0]
        if isinstance(strategy, DDPStrategy):
            name = "ddp"
        elif isinstance(strategy, FullyShardedStrategy):
            group = strategy.expert_parallel_size
            name = "fsdp" if group == 1 else "expert_parallel"
        return cls(
            model.decoder,
            rule_from_config(model.hparams["routing"]),
            model.optimizer_config,
            global_batch_size,
            str(trainer.precision),
            name,
            trainer.num_devices * trainer.num_nodes,
            trainer.accumulate_grad_batches,
            model.decoder.config.activation_checkpointing,
            group,
        )

    def plan(self) -> MemoryPlan:
        """Count the bytes on one device."""
        config, rule, optimizer = self.decoder.config, self.rule, self.optimizer
        micro_batch = self.global_batch_size // (self.devices * self.passes)
        saved = saved_activations(config, rule, micro_batch, self.precision)
        group = self.expert_parallel_size
        return memory_plan(config, rule, optimizer, saved, self.precision, self.strategy, self.devices, group)

    def total(self) -> int:
        """Return the bytes on one device at the peak."""
        return self.plan().total(self.checkpointing)

    def remedies(self) -> str:
        """Return the switches that make the peak smaller, each with its effect, for the end of a message."""
        found = []
        now = self.total()
        for switch, run in self._variants():
            total = run.total()
            if total < now:
                found.append(f"{switch} would take {total / GB:.2f} GB ({(now - total) / GB:.2f} less)")
        if not found:
            return "a smaller model or shorter sequences are left"
        return "; ".join(found)

    def _variants(self) -> Iterator[tuple[str, RunMemory]]:
        sequences = self.global_batch_size // self.devices
        if more := next((n for n in range(2 * self.passes, sequences + 1) if sequences % n == 0), None):
            yield f"trainer.accumulate_grad_batches={more}", replace(self, passes=more)
        if not self.checkpointing:
            yield "model.decoder.activation_checkpointing=true", replace(self, checkpointing=True)
        if self.strategy in ("single", "ddp"):
            devices = max(2, self.devices)
            if self.global_batch_size % (devices * self.passes) == 0:
                sharded = replace(self, strategy="fsdp", devices=devices)
                yield f"--config trainer/fsdp on {devices} GPUs", sharded


def total_memory(device: torch.device) -> int | None:
    """Return the bytes of memory of a GPU; `None` for other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def check_accelerator(accelerator: object) -> None:
    """Refuse a GPU that torch does not see.

    Args:
        accelerator: value of ``trainer.accelerator``.

    Raises:
        UserError: with the reason and what to do.
    """
    if accelerator not in ("gpu", "cuda") or torch.cuda.is_available():
        return
    if accelerator == "gpu" and torch.backends.mps.is_available():
        return
    reason = f"torch {torch.__version__} finds no GPU that it can use (does `nvidia-smi` show one?)"
    if torch.version.cuda is None and torch.version.hip is None:
        reason = f"torch {torch.__version__} was built without CUDA; install a build of torch with CUDA"
    raise UserError(f"trainer.accelerator={accelerator!r}: {reason}, or train on the CPU with --config trainer/cpu")


def check_gpu_memory(trainer: Trainer, model: LanguageModel, global_batch_size: int) -> None:
    """Refuse a model whose weights and optimizer state alone exceed the GPU; warn if ``plan`` says that the rest does.

    Args:
        trainer: trainer that is about to fit.
        model: its model.
        global_batch_size: sequences of an optimizer step.

    Raises:
        UserError: with the arithmetic.
    """
    memory = total_memory(trainer.strategy.root_device)
    run = None if memory is None else RunMemory.of(trainer, model, global_batch_size)
    if memory is None or run is None:
        return
    plan = run.plan()
    held, total = plan.parameters + plan.optimizer, plan.total(run.checkpointing)
    if held > memory:
        raise UserError(
            f"model.decoder: on one GPU, weights ({plan.parameters / GB:.2f} GB) and optimizer state "
            f"({plan.optimizer / GB:.2f} GB) take {held / GB:.2f} GB, but this GPU has {memory / GB:.2f} GB; make the "
            "model smaller, or share it among more GPUs with --config trainer/fsdp"
        )
    if total > memory:
        rank_zero_warn(
            f"`plan` estimates {total / GB:.2f} GB for one GPU, and this GPU has {memory / GB:.2f} GB. {run.remedies()}"
        )


@contextmanager
def memory_explained(trainer: Trainer, model: LanguageModel, global_batch_size: int) -> Iterator[None]:
    """Turn an error of a GPU whose memory ran out inside the block into `MemoryRanOut`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        device = trainer.strategy.root_device
        said = next(iter(str(error).splitlines()), "")[:300].rstrip(".")
        parts = [f"the memory of {device} ran out: {said}"]
        if (memory := total_memory(device)) is not None:
            peak = torch.cuda.max_memory_allocated(device)
            parts.append(f"tensors held {peak / GB:.2f} of {memory / GB:.2f} GB at most")
        if (run := RunMemory.of(trainer, model, global_batch_size)) is not None:
            parts.append(
                f"`plan` estimates {run.total() / GB:.2f} GB for this run; by the same numbers, {run.remedies()}"
            )
        raise MemoryRanOut(". ".join(parts)) from error
