"""The corpora that are on every machine."""

import importlib.metadata
import json
import sysconfig
from pathlib import Path

import pytest

from lightning_moe.data import SitePackages, StandardLibrary
from lightning_moe.errors import UserError


@pytest.fixture(scope="module")
def library() -> dict[str, tuple[str, str]]:
    documents = list(StandardLibrary().documents())
    assert len({d.name for d in documents}) == len(documents)
    return {d.name: (d.text, d.domain) for d in documents}


def test_code_is_the_files_themselves(library: dict[str, tuple[str, str]]) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse.py", "json/decoder.py", "encodings/cp437.py"):
        assert library[name] == ((root / name).read_bytes().decode(), "code")
    assert not any("site-packages" in name or "/test/" in name or name.startswith("test/") for name in library)
    assert sum(len(text) for text, _ in library.values()) > 5e6


def test_prose_is_the_topics_and_not_their_source(library: dict[str, tuple[str, str]]) -> None:
    prose = {name: text for name, (text, domain) in library.items() if domain == "prose"}
    assert len(prose) > 50
    assert "exception" in prose["pydoc_data/topics/exceptions"]
    assert "pydoc_data/topics.py" not in library


def test_files_that_are_not_utf8_are_left_out_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "good.py").write_text("x = 'ä'\n", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes("x = 'ä'\n".encode("latin-1"))
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("y = 1\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_good.py").write_text("z = 1\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with caplog.at_level("INFO"):
        names = [d.name for d in StandardLibrary().documents() if d.domain == "code"]
    assert names == ["good.py"]
    assert "Left out, because they are missing or not UTF-8: latin.py" in caplog.text
    assert "latin.py" in caplog.text
    assert "test/test_good.py" in [d.name for d in StandardLibrary(tests=True).documents()]


def test_fingerprint_follows_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "a.py").write_text("x = 1\n")
    before = StandardLibrary().fingerprint_fields()
    assert StandardLibrary().fingerprint_fields() == before == json.loads(json.dumps(before))
    (tmp_path / "a.py").write_text("x = 2\n")
    assert StandardLibrary().fingerprint_fields() != before
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert StandardLibrary().fingerprint_fields() != before


def test_files_of_one_distribution() -> None:
    documents = list(SitePackages(["packaging"]).documents())
    names = [d.name for d in documents]
    assert "packaging/version.py" in names
    assert names == sorted(names)
    assert all(name.startswith("packaging") and name.endswith(".py") for name in names)
    version = importlib.metadata.version("packaging")
    assert SitePackages(["packaging"]).fingerprint_fields()["distributions"] == {"packaging": version}


def test_all_requirements_by_default() -> None:
    versions = SitePackages().fingerprint_fields()["distributions"]
    assert isinstance(versions, dict)
    assert versions["torch"] == importlib.metadata.version("torch")
    assert {"lightning", "sympy", "tokenizers"} < versions.keys()  # sympy is torch's
    assert "docstring-parser" in versions  # an extra: jsonargparse[signatures]
    assert not {"lightning_moe", "lightning-moe", "ruff", "pytest"} & versions.keys()


def test_a_file_of_several_distributions_is_read_once() -> None:
    shared = {d: {str(f) for f in importlib.metadata.files(d) or []} for d in ("mlflow", "mlflow-skinny")}
    assert "mlflow/version.py" in shared["mlflow"] & shared["mlflow-skinny"]
    names = [d.name for d in SitePackages(list(shared)).documents()]
    assert len(set(names)) == len(names)
    assert "mlflow/version.py" in names


def test_a_distribution_that_is_not_installed() -> None:
    with pytest.raises(UserError, match="'no-such-thing' is not installed"):
        list(SitePackages(["no-such-thing"]).documents())
