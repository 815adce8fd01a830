"""``ui``: MLflow's pages on the runs of this folder, for this machine only."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from lightning_moe.cli.arguments import command_parser
from lightning_moe.errors import UserError

DESCRIPTION = """\
Serve MLflow's pages for a store on 127.0.0.1 and print the address: a table of the runs with the columns that matter
here, and the chart comparison. Ctrl-C ends it."""


def run(command: str, args: list[str]) -> None:
    """Replace this process by the server.

    Raises:
        UserError: no such store, a store that is a server already, or a port in use.
        SystemExit: code 2 on unknown options, 0 after ``--help``.
    """
    parser = command_parser(command, DESCRIPTION)
    parser.add_argument("--tracking_uri", metavar="URI", help="MLflow's store (default: as for fit)")
    parser.add_argument("--port", type=int, default=5000, help="port on 127.0.0.1 (default: 5000)")
    options = parser.parse_args(args)

    from lightning_moe.tracking.store import redact, resolve_uri, ui_command

    uri = resolve_uri(options.tracking_uri)
    line = ui_command(uri, options.port)
    if line is None:
        raise UserError(f"{redact(uri)} is a server already: open that address in a browser")
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not path.exists():
        raise UserError(f"{path}: no such store; `fit` makes it, or give another with --tracking_uri")
    _check_port(options.port)
    from lightning_moe.tracking.view import prepare_views

    for name, address in prepare_views(uri, f"http://127.0.0.1:{options.port}").items():
        print(f"{name}: {address}", flush=True)
    os.environ["MLFLOW_TRACKING_URI"] = uri  # the command reads it where the URI has a password
    os.execv("/bin/sh", ["sh", "-c", f"exec env {line}"])


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port}: {error}; choose another one") from None
