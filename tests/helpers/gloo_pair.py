"""Two real processes with a gloo group between them, which run any importable function on demand."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 240


class GlooPair:
    """``pair.run(function, [args of rank 0, args of rank 1])`` gives both results; an exception there is raised here.

    The environment is that of a launched Lightning process, so a `Trainer(devices=2)` in ``function`` joins the group.
    """

    world_size = 2

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")  # imports once for both
        self._context.set_forkserver_preload(["lightning.pytorch", "lightning_moe.callbacks"])
        self._folder = tempfile.TemporaryDirectory()  # the stacks of processes that die
        self._start()

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(self.world_size):
            ours, theirs = self._context.Pipe()
            arguments = (rank, self.world_size, port, theirs, self._stacks(rank))
            process = self._context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], args_of_ranks: Sequence[tuple[Any, ...]]) -> list[Any]:
        if not all(process.is_alive() for process in self._processes):
            self._stop()  # a process that died failed its own test, and no other
            self._start()
        for pipe, args in zip(self._pipes, args_of_ranks, strict=True):
            pipe.send_bytes(pickle.dumps((function, args)))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_SECONDS):
                raise TimeoutError(f"rank {rank} did not answer within {TIMEOUT_SECONDS} s")
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                self._processes[rank].join()
                stacks = Path(self._stacks(rank)).read_text()
                ok, value = False, f"rank {rank} died, exit code {self._processes[rank].exitcode}:\n{stacks}"
            (results if ok else failures).append(value)
        if failures:
            raise AssertionError("\n".join(failures))
        return results

    def _stacks(self, rank: int) -> str:
        return f"{self._folder.name}/{rank}.txt"

    def _stop(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()

    def __enter__(self) -> GlooPair:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._folder.cleanup()


def _serve(rank: int, world_size: int, port: int, pipe: Connection, stacks: str) -> None:
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch
    import torch.distributed as dist

    faulthandler.enable(open(stacks, "w"))  # noqa: SIM115 - as long as the process lives
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, f"rank {rank}:\n{traceback.format_exc()}")
        pipe.send_bytes(pickle.dumps(answer))
