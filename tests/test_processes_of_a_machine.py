"""What this process may use of its machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_moe.cli.prepare import OPTIONS
from lightning_moe.processes import drop_stale_ranks, usable_cores

PINNED = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from lightning_moe.processes import "


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_only_the_cores_that_the_process_may_use_count() -> None:
    assert usable_cores() == len(os.sched_getaffinity(0))
    code = f"{PINNED}usable_cores; print(usable_cores())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
    assert "one per usable core" in OPTIONS["--workers N"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:surrogateescape"])
def test_what_a_stream_cannot_encode_is_replaced(encoding: str) -> None:
    code = "from lightning_moe.cli import main; main(['--help']); print('ф→')"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith(b"??\n")


def test_closed_streams_do_not_receive_the_content_of_files(tmp_path: Path) -> None:
    """The system gives the lowest free number to the next file, and 1 is where libraries print."""
    code = (
        "import os, sys\n"
        "from lightning_moe.processes import repair_streams\n"
        "repair_streams()\n"
        "with open(sys.argv[1], 'w') as file:\n"
        "    print('to nobody')\n"
        "    print('to nobody', file=sys.stderr)\n"
        "    os.write(1, b'to nobody')\n"
        "    os.system('echo to nobody')\n"
        "    file.write('content')\n"
    )
    script, file = tmp_path / "script.py", tmp_path / "file"
    script.write_text(code)
    command = f"'{sys.executable}' '{script}' '{file}' <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command]).returncode == 0
    assert file.read_text() == "content"


@pytest.mark.parametrize(
    ("variables", "dropped"),
    [
        ({"RANK": "3"}, {"RANK"}),
        ({"LOCAL_RANK": "1", "RANK": "x"}, {"LOCAL_RANK", "RANK"}),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, set()),  # torchrun
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}, set()),  # a child of Lightning
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}, set()),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}, {"SLURM_PROCID"}),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"}, {"SLURM_PROCID"}),
        ({"SLURM_PROCID": "3"}, {"SLURM_PROCID"}),
        ({"SLURM_PROCID": "0", "SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "1"}, set()),
        ({}, set()),
    ],
)
def test_ranks_that_no_launcher_gave_this_process_are_dropped(
    variables: dict[str, str], dropped: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    environment = dict(variables)
    drop_stale_ranks(environment)
    assert environment == {name: value for name, value in variables.items() if name not in dropped}
    message = capsys.readouterr().err
    assert all(f"{name}={variables[name]}" in message for name in dropped)
    assert bool(message) == bool(dropped)
