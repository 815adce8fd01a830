"""Layouts of processes that would train wrongly are refused before any process is started, and leave no trace."""

import re
from pathlib import Path

import pytest
from helpers.small_run import Command

TWO = ("--trainer.accelerator=cpu", "--trainer.devices=2")
TENSOR_PARALLEL = "trainer: {strategy: {class_path: lightning.pytorch.strategies.ModelParallelStrategy}}"
SCHEDULER = (
    "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.GradientAccumulationScheduler, "
    "init_args: {scheduling: {0: 1, 1: 2}}}]}"
)
REFUSED = [
    (
        (*TWO, "--config", "tensor_parallel.yaml"),
        "trainer.strategy=ModelParallelStrategy: Lightning's default for it is tensor parallelism, .* trainer/fsdp",
    ),
    ((*TWO, "--trainer.strategy=ddp_spawn"), "trainer.strategy=DDPStrategy: processes made by fork or spawn"),
    (
        ("--trainer.accelerator=cpu", "--trainer.devices=3", "--trainer.strategy=ddp"),
        "data.global_batch_size=8: .* over 3 processes .* It must be a multiple of 3",
    ),
    (
        (*TWO, "--trainer.strategy=ddp", "--trainer.accumulate_grad_batches=8"),
        r"over 2 processes .*× trainer.accumulate_grad_batches=8. It must be a multiple of 16",
    ),
    (
        ("--config", "trainer/fsdp", "--trainer.accelerator=cpu", "--trainer.devices=16"),
        "There are more processes than sequences",
    ),
    (
        ("--config", "trainer/multi_node", *TWO, "--trainer.num_nodes=3"),
        r"over 6 processes \(trainer.devices=2 × trainer.num_nodes=3\)",
    ),
    (
        ("--config", "trainer/expert_parallel", *TWO, "--trainer.strategy.expert_parallel_size=3"),
        "expert_parallel_size=3: must divide trainer.devices × trainer.num_nodes=2",
    ),
    (
        ("--config", "trainer/expert_parallel", *TWO, "--model.decoder.num_experts=5"),
        "expert_parallel_size=2: must divide model.decoder.num_experts=5",
    ),
    (("--config", "schedule.yaml"), "GradientAccumulationScheduler .* must stay the same"),
]


@pytest.mark.parametrize(("args", "message"), REFUSED)
def test_a_wrong_layout_is_refused(args: tuple[str, ...], message: str, command: Command, workplace: Path) -> None:
    (workplace / "schedule.yaml").write_text(SCHEDULER)
    (workplace / "tensor_parallel.yaml").write_text(TENSOR_PARALLEL)
    code, _, err = command("fit", "--config", "small", *args)
    assert code == 2, err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line
    assert not list(workplace.glob("runs/*"))
