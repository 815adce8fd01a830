"""Corpora: where documents come from. This file has the interface, and the two corpora that need no download."""

import hashlib
import os
import platform
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from lightning_moe.data.find_files import say_left_out
from lightning_moe.errors import UserError


class Document(NamedTuple):
    """One text of a corpus.

    Args:
        name: stable identity inside the corpus, such as a relative path.
        text: the text itself.
        domain: label such as "code" or "prose", for measurements per domain.
    """

    name: str
    text: str
    domain: str


class Corpus(ABC):
    """A finite sequence of documents, the same each time it is read."""

    @property
    def kind(self) -> str:
        """Name of its class; also for the stand-in that jsonargparse makes of a default."""
        return type(self).__name__.removeprefix("LazyInstance_")

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yield all documents, in a fixed order.

        Raises:
            UserError: a document cannot be read.
        """

    @abstractmethod
    def fingerprint_fields(self) -> dict[str, object]:
        """Return what identifies the documents, as JSON values: equal fields mean equal documents.

        Prepared data is found by these fields, at each start of a run, so they must be cheap to compute.
        """


class StandardLibrary(Corpus):
    """The standard library of the running Python: 12 MB without a download.

    The `.py` files are the domain "code". The language reference that `help()` shows (`pydoc_data.topics`) is the
    domain "prose", one document per topic.

    Args:
        tests: Whether the tests are included, 19 MB more where they are installed. They repeat themselves so much that
            gzip packs the validation text to 1.6 bits per byte (2.0 without them).
    """

    def __init__(self, tests: bool = False) -> None:
        self.tests = tests

    def documents(self) -> Iterator[Document]:
        """Yield the files in the order of their paths, then the topics in the order of their names."""
        from pydoc_data.topics import topics

        root = Path(sysconfig.get_path("stdlib"))
        excluded = {"site-packages", "dist-packages", "__pycache__"}
        if not self.tests:
            excluded |= {"test", "tests", "idle_test"}
        found: list[str] = []
        for folder, folders, files in os.walk(root, onerror=_refuse):
            folders[:] = [name for name in folders if name not in excluded]  # installed packages may be many
            found += [Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
        # The file of the topics repeats, as code, what follows as prose.
        paths = sorted(path for path in found if path != "pydoc_data/topics.py")
        yield from _python_files((path, root / path) for path in paths)
        for name in sorted(topics):
            yield Document(f"pydoc_data/topics/{name}", topics[name], "prose")

    def fingerprint_fields(self) -> dict[str, object]:
        """Return the Python version, and the number, bytes and digest of all documents (takes 0.2 s)."""
        return {"corpus": "StandardLibrary", "python": platform.python_version(), **_digest(self.documents())}


class SitePackages(Corpus):
    """The `.py` files of installed distributions: real text without a download.

    Args:
        distributions: Names of installed distributions. Null: all that this project requires, directly or indirectly.
    """

    def __init__(self, distributions: list[str] | None = None) -> None:
        self.distributions = distributions

    def documents(self) -> Iterator[Document]:
        """Yield the files in the order of distribution and path, all of the domain "code"."""
        seen: set[str] = set()  # some files belong to several distributions (mlflow and mlflow-skinny)
        for distribution in self._installed().values():
            files = distribution.files
            if files is None:
                raise UserError(
                    f"data.corpus.distributions: {distribution.name} has no list of its files (RECORD). "
                    "Leave it out, or install it as a wheel."
                )
            listed = {str(file) for file in files if file.suffix == ".py" and ".." not in file.parts}
            names = sorted(listed - seen)
            seen |= listed
            yield from _python_files((name, Path(str(distribution.locate_file(name)))) for name in names)

    def fingerprint_fields(self) -> dict[str, object]:
        """Return the names and versions of the distributions."""
        versions = {name: distribution.version for name, distribution in self._installed().items()}
        return {"corpus": "SitePackages", "distributions": versions}

    def _installed(self) -> dict[str, metadata.Distribution]:
        from packaging.utils import canonicalize_name

        names = self.distributions if self.distributions is not None else _required_distributions("lightning_moe")
        found = {}
        for name in names:
            try:
                distribution = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                raise UserError(f"data.corpus.distributions: {name!r} is not installed.") from None
            found[str(canonicalize_name(distribution.name))] = distribution
        return dict(sorted(found.items()))


def _refuse(error: OSError) -> None:
    raise UserError(f"data.corpus: {error.filename} cannot be read: {error.strerror}.") from None


def _python_files(paths: Iterable[tuple[str, Path]]) -> Iterator[Document]:
    """Yield documents of (name, path) pairs; leave out and name what is not UTF-8 (mostly test data)."""
    skipped = []
    for name, path in paths:
        try:
            yield Document(name, path.read_bytes().decode(), "code")
        except UnicodeDecodeError:
            skipped.append(name)
        except FileNotFoundError:  # listed by its distribution, removed since (slim images do this)
            skipped.append(name)
        except OSError as error:
            _refuse(error)
    if skipped:
        say_left_out(skipped, "because they are missing or not UTF-8")


def _digest(documents: Iterable[Document]) -> dict[str, object]:
    """Return the number of documents, their bytes, and one digest of all names, domains and texts."""
    digest = hashlib.sha256()
    count = size = 0
    for document in documents:
        text = document.text.encode()
        header = f"{document.name}\0{document.domain}\0{len(text)}\0"
        digest.update(header.encode())
        digest.update(text)
        count += 1
        size += len(text)
    return {"documents": count, "bytes": size, "sha256": digest.hexdigest()}


def _required_distributions(root: str) -> list[str]:
    """Return the names of all installed distributions that `root` requires, directly or indirectly, without itself."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    try:
        metadata.distribution(root)
    except metadata.PackageNotFoundError:
        raise UserError(f"data.corpus: {root} is not installed; name the distributions to read.") from None
    pending: list[tuple[str, frozenset[str]]] = [(root, frozenset())]  # (distribution, wanted extras)
    seen = set(pending)
    while pending:
        name, extras = pending.pop()
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            seen.discard((name, extras))  # an optional part that is not installed here
            continue
        for requirement in map(Requirement, requirements):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                found = (canonicalize_name(requirement.name), frozenset(requirement.extras))
                if found not in seen:
                    seen.add(found)
                    pending.append(found)
    return sorted({name for name, _ in seen} - {root, canonicalize_name(root)})
