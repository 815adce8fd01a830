"""``ui``: MLflow's pages on the runs of this folder, for this machine only."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

from lightning_moe.cli.arguments import add_shared, command_parser, whole_number
from lightning_moe.errors import UserError

DESCRIPTION = """\
Serve MLflow's pages for a store on 127.0.0.1, and print the addresses when they answer: a table of the runs with the
columns that matter here, and the comparison in charts. Ctrl-C ends it."""


def run(command: str, args: list[str]) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        UserError: there is no such store, it is a server already, the port is in use, or the server fails.
        SystemExit: code 2 on unknown options, 0 after ``--help``.
    """
    parser = command_parser(command, DESCRIPTION)
    add_shared(parser, "--tracking_uri", " (default: as for fit)")
    parser.add_argument("--port", type=whole_number(1, 65_535), default=5000, help="port on 127.0.0.1 (default: 5000)")
    options = parser.parse_args(args)

    from lightning_moe.redaction import redact
    from lightning_moe.tracking.store import resolve_uri, serve_command

    uri = resolve_uri(options.tracking_uri)
    line = serve_command(uri, options.port)
    if line is None:
        raise UserError(f"{redact(uri)} is a server already: open that address in a browser")
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not path.exists():
        raise UserError(f"{path}: no such store; `fit` makes it, or give another with --tracking_uri")
    _check_port(options.port)
    from lightning_moe.tracking.view import prepare_views

    addresses = prepare_views(uri, f"http://127.0.0.1:{options.port}")
    # the command reads a URI with a password from the environment
    server = subprocess.Popen(["sh", "-c", f"exec env {line}"], env={**os.environ, "MLFLOW_TRACKING_URI": uri})
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    try:
        if _answers(server, options.port):
            for name, address in addresses.items():
                print(f"{name}: {address}", flush=True)
            print("Ctrl-C ends it.", flush=True)
        code = server.wait()
    except KeyboardInterrupt:  # the server got it, too
        server.wait()
        return
    if code not in (0, -signal.SIGTERM):
        raise UserError(f"MLflow's server ended with exit code {code}; its own messages are above")


def _answers(server: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until the server takes requests or ends; return whether it takes them."""
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return True
        except OSError:
            time.sleep(0.1)
    return False


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port}: {error}; choose another one") from None
