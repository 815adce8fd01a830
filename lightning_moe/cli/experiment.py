"""``fit``, ``validate``, ``test`` and ``predict``; those with ``--model`` go to `validate_released`."""

from __future__ import annotations

from lightning_moe.cli import validate_released
from lightning_moe.processes import garbage_kept
from lightning_moe.runs import folder as rundir
from lightning_moe.training.request import read_request


def run(command: str, args: list[str]) -> None:
    """Run one of the four commands.

    Raises:
        UserError: bad configuration, checkpoint or data.
        RunEnded: training ended before its last step.
    """
    if command in ("validate", "test") and any(arg == "--model" or arg.startswith("--model=") for arg in args):
        validate_released.run(command, args)
        return
    request = read_request(command, args)
    with garbage_kept():
        from lightning_moe.training.run import evaluate, fit, predict  # torch and lightning: seconds

    try:
        if command == "fit":
            fit(request)
        elif command == "predict":
            predict(request)
        else:
            evaluate(command, request)
    finally:
        rundir.drop_unless_begun()
