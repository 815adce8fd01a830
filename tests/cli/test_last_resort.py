"""An error that nothing expects ends as one line; its traceback is in a file for this user alone."""

import re
import stat
from pathlib import Path

import pytest

from lightning_moe.cli.main import report_errors


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyError("loops"), 70),
        (RuntimeError("first line\nsecond line"), 70),
        (RecursionError("maximum recursion depth exceeded"), 70),
        (MemoryError(), 6),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"), 6),
    ],
)
def test_one_line_and_a_file(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert report_errors(lambda: fail(error)) == code
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert type(error).__name__ in err
    found = re.search(r"Its traceback is in (\S+)", err)
    assert found is not None
    path = Path(found.group(1))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().startswith("Traceback")
    assert "in fail" in path.read_text()


def test_passwords_are_taken_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    report_errors(lambda: fail(KeyError("postgresql://me:hunter2@host/db")))
    assert "hunter2" not in capsys.readouterr().err + "".join(file.read_text() for file in tmp_path.iterdir())


def test_with_the_debug_variable_it_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_MOE_DEBUG", "1")
    with pytest.raises(KeyError):
        report_errors(lambda: fail(KeyError("x")))
