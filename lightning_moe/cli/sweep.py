"""``sweep``: trials over a search space, with Optuna."""

from __future__ import annotations

from lightning_moe.cli.arguments import add_shared, command_parser, home_path, stopped

DESCRIPTION = """\
Run the trials of a sweep's file (see docs/sweeps.md), each the real ``fit`` in a process of its own. Stop it at any
time, even by kill -9: the same command continues, and killed trials continue from their checkpoints. Started several
times, or on several machines with a PostgreSQL storage, the processes share the work."""


def run(command: str, args: list[str]) -> None:
    """Run the sweep to its end.

    Raises:
        UserError: bad input, before the first trial.
        SystemExit: code 2 on unknown options, 0 after ``--help``.
    """
    parser = command_parser(command, DESCRIPTION)
    parser.add_argument("file", type=home_path, help="the sweep's file, such as sweeps/ema_capacity.yaml")
    for flag in ("--workers", "--config", "--name"):
        add_shared(parser, flag)
    options = parser.parse_args(args)

    from lightning_moe.sweep.main import run_sweep
    from lightning_moe.sweep.spec import read_sweep

    try:
        run_sweep(read_sweep(options.file, options.config, options.name), options.workers)
    except KeyboardInterrupt as stop:
        raise stopped(stop) from None
