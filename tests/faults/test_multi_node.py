"""Two "machines": two torchrun agents that find each other by rendezvous, one process each."""

import signal
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


FIT = (str(MAIN), "fit", "--config", "small", "--config", "trainer/multi_node", "--trainer.accelerator=cpu")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(place: Workplace, number: int, command: list[str], environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    with (place.folder / f"node-{number}.log").open("wb") as log:
        return subprocess.Popen(
            command, cwd=place.folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def start_nodes(place: Workplace, *args: str, fault: str = "") -> "list[subprocess.Popen[bytes]]":
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max_restarts=0"]
    torchrun += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=test"]
    command = [*torchrun, *FIT, "--trainer.devices=1", "--run_name=nodes", *args]
    return [start(place, number, command, place.environment() | {"FAULT": fault}) for number in range(2)]


def start_tasks(place: Workplace, fault: str = "") -> "list[subprocess.Popen[bytes]]":
    job = {"JOB_ID": "1", "JOB_NAME": "test", "NTASKS": "2", "NTASKS_PER_NODE": "1", "NNODES": "2", "LOCALID": "0"}
    common = {f"SLURM_{name}": value for name, value in job.items()}
    common |= {"SLURM_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, *FIT, "--trainer.devices=1", "--run_name=tasks", "--ckpt_path=last"]
    own = [{"SLURM_PROCID": str(number), "SLURM_NODEID": str(number), "FAULT": fault} for number in range(2)]
    return [start(place, number, command, place.environment() | common | own[number]) for number in range(2)]


def wait_for(place: Workplace) -> None:
    """Until the fault says that it was reached."""
    deadline = time.monotonic() + PATIENCE
    while not (place.folder / "fault-reached").exists():
        assert time.monotonic() < deadline, logs(place)
        time.sleep(0.1)


def logs(place: Workplace) -> str:
    return "\n".join(Path(place.folder / f"node-{number}.log").read_text(errors="replace") for number in range(2))


def test_two_machines_train_as_two_processes_and_survive_one_of_them(workplace: Callable[[str], Workplace]) -> None:
    place = workplace("FSDP2 × 2")
    (place.folder / "fault-reached").unlink(missing_ok=True)
    nodes = start_nodes(place, fault='{"point": "after the optimizer", "call": 8, "effect": "report"}')
    wait_for(place)
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


def test_tasks_of_slurm_stop_at_its_warning_and_continue(workplace: Callable[[str], Workplace]) -> None:
    """Two processes with the variables that srun sets; SIGUSR1 is its warning before the time limit."""
    place = workplace("FSDP2 × 2")
    (place.folder / "fault-reached").unlink(missing_ok=True)
    tasks = start_tasks(place, fault='{"point": "after the optimizer", "call": 4, "effect": "report"}')
    wait_for(place)
    for task in tasks:
        task.send_signal(signal.SIGUSR1)
    # rank 0 speaks for all: with --kill-on-bad-exit, srun would kill it while it still sends its end to MLflow
    assert [task.wait(PATIENCE) for task in tasks] == [143, 0], logs(place)
    assert logs(place).count("stopped by SIGUSR1") == 1

    tasks = start_tasks(place)
    assert [task.wait(PATIENCE) for task in tasks] == [0, 0], logs(place)
    ours, whole = place.run("tasks"), place.run("whole")
    assert differences(ours.checkpoint(), whole.checkpoint()) == []
    assert ours.metrics() == whole.metrics()
