"""The table of commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_moe import __version__
from lightning_moe.cli.main import COMMANDS, main


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out and command.summary in out for name, command in COMMANDS.items())
    assert main([]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("args", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_and_version_import_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys; from lightning_moe.cli import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'lightning', 'mlflow', 'datasets', 'optuna', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(code or (str(heavy) if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    if args == ["--version"]:
        assert f"lightning_moe {__version__} (torch " in done.stdout


def test_an_unknown_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["valdate"]) == 2
    assert "unknown command 'valdate': did you mean 'validate'?" in capsys.readouterr().err


@pytest.mark.parametrize("args", [[], ["audit", "--help"], ["compare", "runs", "--no_mlflow"]])
def test_where_nobody_reads_the_command_ends_without_a_word(args: list[str], tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    reader, writer = os.pipe()
    os.close(reader)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "lightning_moe", *args]
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path, env=environment
        )
    expected = (2, 1) if args[:1] == ["compare"] else (141, 0)  # its error goes to stderr, which is read
    assert (done.returncode, len(done.stderr.splitlines())) == expected


def test_another_broken_pipe_is_not_hidden(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(command: str, args: list[str]) -> None:
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr("lightning_moe.cli.audit.run", run)
    assert main(["audit"]) == 70
    assert "BrokenPipeError: of a worker" in capsys.readouterr().err


def test_a_missing_file_is_reported_before_torch_is_imported() -> None:
    code = (
        "import sys; from lightning_moe.cli import main; code = main(['fit', '--config', 'gone']); "
        "sys.exit(code + 10 * ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: configuration file 'gone' not found")
    assert "Traceback" not in done.stderr
