"""What this process may use of its machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_moe.cli.prepare import OPTIONS
from lightning_moe.processes import usable_cores

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
    done = subprocess.run(
        [sys.executable, "-m", "lightning_moe", "ф→"],
        env={**os.environ, "PYTHONIOENCODING": f"{encoding}:strict" if ":" not in encoding else encoding},
        capture_output=True,
    )
    assert done.returncode == 2
    assert b"error: unknown command '??'" in done.stderr
    assert b"Traceback" not in done.stderr


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
