"""The files a run is recorded in."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_moe.atomic import write_atomically
from lightning_moe.tracking.files import LineFile, is_valid_name, read_lines, read_metrics

names = st.text(min_size=1).filter(lambda name: name not in ("step", "time"))
values = st.floats() | st.integers(-(2**53), 2**53).map(float)


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


@given(st.lists(st.dictionaries(names, values), max_size=5))
def test_what_is_read_is_what_was_written(tmp_path_factory: pytest.TempPathFactory, lines: list[dict[str, float]]):
    folder = tmp_path_factory.mktemp("run")
    file = LineFile(folder / "metrics.jsonl")
    for step, line in enumerate(lines):
        file.append({"step": step, "time": 0.5, **line})
    file.close()

    read = read_metrics(folder)

    assert [line["step"] for line in read] == list(range(len(lines)))
    for written, found in zip(lines, read, strict=True):
        assert found.keys() - {"step", "time"} == written.keys()
        assert all(same(found[name], value) for name, value in written.items())


def test_every_line_is_json_that_any_reader_takes(tmp_path: Path):
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    file = LineFile(tmp_path / "metrics.jsonl")
    file.append({"step": 0, "time": 1.0, "loss": math.nan, "grad": math.inf, "least": -math.inf})

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (line["loss"], line["grad"], line["least"]) == ("NaN", "Infinity", "-Infinity")


@pytest.mark.parametrize("torn", [b'{"step": 2, "ti', b'{"step": 2}'])
def test_a_torn_last_line_is_not_read_and_not_written_after(tmp_path: Path, torn: bytes):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn)
    assert [record for record, _ in read_lines(path)] == [{"step": 1}]

    file = LineFile(path)
    file.drop_partial_line()
    file.append({"step": 3})

    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'


def test_a_damaged_line_hides_no_other_and_offsets_lead_back_to_the_rest(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\x00 garbage\n7}\n{"step": 2}\n{"step": 3}\n')

    read = list(read_lines(path))

    assert [record["step"] for record, _ in read] == [1, 2, 3]
    for index, (_, end) in enumerate(read):
        assert [record for record, _ in read_lines(path, end)] == [record for record, _ in read[index + 1 :]]


def test_a_missing_file_has_no_lines(tmp_path: Path):
    assert read_metrics(tmp_path) == []


def test_a_second_holder_of_the_lock_is_refused(tmp_path: Path):
    first, second = LineFile(tmp_path / "a"), LineFile(tmp_path / "a")
    assert first.try_lock()
    assert not second.try_lock()
    first.close()
    assert second.try_lock()


@settings(deadline=None)  # the first example imports MLflow
@given(st.text(alphabet="aZ9é_-. :/@[]\n\\%", max_size=12) | st.text(max_size=8))
@example("routing/layer_03/max_load")
@example("a/../b")
@example("/a")
@example("a//b")
@example("..a")
@example("a" * 250)
@example("a" * 251)
def test_names_are_valid_where_mlflow_says_so(name: str):
    from mlflow.exceptions import MlflowException
    from mlflow.utils.validation import _validate_length_limit, _validate_metric_name

    try:
        _validate_metric_name(name)
        _validate_length_limit("Metric name", 250, name)
        accepted = True
    except MlflowException:
        accepted = False
    assert is_valid_name(name) == (accepted and not name.endswith("\n"))


def test_an_atomic_write_replaces_and_leaves_nothing_beside(tmp_path: Path):
    path = tmp_path / "state.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_atomic_write_that_fails_keeps_the_old_file(tmp_path: Path):
    path = tmp_path / "state.json"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "text is not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
