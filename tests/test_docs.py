"""The documents: their links lead somewhere, and they name what is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_floors import FLOORS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if ":" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_every_guide_is_in_the_table_of_contents() -> None:
    contents = (ROOT / "docs" / "index.md").read_text().split()
    assert {page.stem for page in ROOT.glob("docs/*.md")} - {"index"} <= set(contents)


def test_the_plan_in_the_architecture_is_the_one_that_the_floors_test_holds() -> None:
    plan = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    floors = [[line.split()[0] for line in floor.splitlines()] for floor in plan.strip().split("\n\n")]
    assert [sorted(rooms) for rooms in floors] == [sorted(floor.split()) for floor in FLOORS]


def test_decisions_are_numbered_dated_and_cited_by_number() -> None:
    headings = re.findall(r"^### (.*)", (ROOT / "docs" / "decisions.md").read_text(), re.MULTILINE)
    entries = [re.fullmatch(r"(\d+)\. .* \(\d{4}-\d\d-\d\d(?:; not kept: .*)?\)", heading) for heading in headings]
    assert None not in entries
    numbers = [int(entry[1]) for entry in entries if entry is not None]
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    code = [*ROOT.glob("lightning_moe/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("docs/*.md")]
    cited = {int(number) for path in code for number in re.findall(r"\bdecision (\d+)", path.read_text())}
    assert cited <= set(numbers)


@pytest.mark.slow
def test_the_guides_and_the_api_pages_build_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", tmp_path / "doctrees"]
    built = subprocess.run([*command, ROOT / "docs", tmp_path / "html"], capture_output=True, text=True, cwd=ROOT)
    assert (built.returncode, built.stderr) == (0, "")
    page = (tmp_path / "html" / "api" / "lightning_moe.routing.html").read_text()
    assert 'id="lightning_moe.routing.ExpertThreshold"' in page
