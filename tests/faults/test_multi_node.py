"""Two "machines": two torchrun agents that find each other by rendezvous, one process each."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from fault_runs import MAIN, PATIENCE, Workplace, differences

pytestmark = pytest.mark.faults


def start_nodes(place: Workplace, *args: str, fault: str = "") -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max_restarts=0"]
    torchrun += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test"]
    fit = [str(MAIN), "fit", "--config", "small", "--config", "trainer/multi_node", "--run_name=nodes"]
    fit += ["--trainer.accelerator=cpu", "--trainer.devices=1", *args]
    environment = place.environment() | {"FAULT": fault}
    nodes = []
    for number in range(2):
        with (place.folder / f"node-{number}.log").open("wb") as log:
            nodes.append(
                subprocess.Popen(
                    [*torchrun, *fit],
                    cwd=place.folder,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return nodes


def logs(place: Workplace) -> str:
    return "\n".join(Path(place.folder / f"node-{number}.log").read_text(errors="replace") for number in range(2))


def test_two_machines_train_as_two_processes_and_survive_one_of_them(workplace: Callable[[str], Workplace]) -> None:
    place = workplace("FSDP2 × 2")
    reached = place.folder / "fault-reached"
    reached.unlink(missing_ok=True)
    nodes = start_nodes(place, fault='{"point": "behind the optimizer", "call": 8, "effect": "tell"}')
    deadline = time.monotonic() + PATIENCE
    while not reached.exists():
        assert time.monotonic() < deadline, logs(place)
        time.sleep(0.1)
    agent = psutil.Process(nodes[1].pid)
    for process in (*agent.children(recursive=True), agent):
        process.kill()
    for node in nodes:
        assert node.wait(PATIENCE) != 0

    nodes = start_nodes(place, "--ckpt_path=last")
    assert [node.wait(PATIENCE) for node in nodes] == [0, 0], logs(place)
    assert logs(place).count("Run folder: runs/nodes") == 1
    ours, whole = place.run("nodes"), place.run("whole")
    assert differences(ours.checkpoint(), whole.checkpoint()) == []
    assert ours.metrics() == whole.metrics()
