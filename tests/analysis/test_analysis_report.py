"""The report: self-contained, complete, nothing overwritten unasked."""

import json
import math
import re
from pathlib import Path

import pytest

from lightning_moe.analysis.findings import Finding, Summary
from lightning_moe.analysis.report import check_output, write_report
from lightning_moe.analysis.section import Section
from lightning_moe.errors import UserError
from lightning_moe.report.figures import grid

SUMMARY = Summary(
    [Finding("One is <more>.", "first", {}), Finding("Nothing more.", "", {})],
    [Finding("a & b", "second", {"et": 0.51234, "<dense>": None})],
)


def sections() -> list[Section]:
    figure, [[axis]] = grid(1, 1, 2, 1)
    axis.plot([0, 1], [0, 1])
    rows = [{"name": "<b>", "x": 0.1234567890123, "n": 12345}, {"name": "y", "x": math.nan, "n": None, "more": 1}]
    return [
        Section("first", "First & only", "<p>text</p>", {"first_table": rows}, {"fig": figure}, summary=rows),
        Section("second", "Second", "<p>text</p>", missing=["run <a>: no record"]),
    ]


def test_all_files_are_written_and_the_page_needs_no_other(tmp_path: Path) -> None:
    files = write_report(tmp_path / "out", "title <x>", SUMMARY, {"Facts": [{"a": 1}]}, sections())
    assert [str(f.relative_to(tmp_path / "out")) for f in files] == [
        "report.html", "analysis.json", "numbers/first_table.csv", "figures/fig.png",
    ]  # fmt: skip
    page = files[0].read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert "http" not in page
    assert "title &lt;x&gt;" in page
    assert "&lt;b&gt;" in page
    assert "12,345" in page
    assert "Not shown: run &lt;a&gt;: no record" in page
    assert page.count("<img") == 1
    assert files[3].read_bytes().startswith(b"\x89PNG")
    summary = page[page.index('id="summary"') : page.index("Facts")]  # before everything else
    assert '<li>One is &lt;more&gt;. (<a href="#first">First &amp; only</a>)</li>\n<li>Nothing more.</li>' in summary
    assert "<th>et</th><th>&lt;dense&gt;</th>" in summary
    assert '<td><a href="#second">a &amp; b</a></td><td>0.5123</td><td>–</td>' in summary
    content = json.loads(files[1].read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert content["first"]["summary"][1]["x"] is None
    assert content["summary"]["sentences"] == ["One is <more>.", "Nothing more."]
    assert content["summary"]["findings"] == [
        {"text": "a & b", "section": "second", "values": {"et": 0.51234, "<dense>": None}}
    ]
    assert content["second"]["missing"] == ["run <a>: no record"]


def test_a_folder_with_content_is_kept(tmp_path: Path) -> None:
    check_output(tmp_path / "new", overwrite=False)
    check_output(tmp_path, overwrite=False)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="nothing is overwritten without --overwrite"):
        check_output(tmp_path, overwrite=False)
    check_output(tmp_path, overwrite=True)
    write_report(tmp_path, "t", SUMMARY, {}, sections())
    assert (tmp_path / "mine.txt").read_text() == "mine"
    with pytest.raises(UserError, match="is a file; name a folder"):
        check_output(tmp_path / "mine.txt", overwrite=True)
