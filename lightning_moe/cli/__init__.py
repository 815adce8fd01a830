"""The command line: ``python -m lightning_moe <command>``.

`main` finds the command in one table and imports only what that command needs, so that ``--help`` is immediate.
"""

from lightning_moe.cli.main import main

__all__ = ["main"]
