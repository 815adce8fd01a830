"""Sphinx: the guides of this folder, and the API from the docstrings (`make docs` writes build/docs)."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import lightning_moe

project = "lightning_moe"
version = lightning_moe.__version__
html_title = f"{project} {version}"
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["wide.css"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["examples"]
myst_heading_anchors = 3
myst_links_external_new_tab = False
default_role = "py:obj"  # `name` in a docstring links to what it names
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 100

REPOSITORY = Path(__file__).parent.parent
API = Path(__file__).parent / "api"
PAGES_OF_THE_ROOT = {"index": "README.md", "contributing": "CONTRIBUTING.md"}


def public_modules(package: ModuleType) -> list[str]:
    """Return the names of a package's modules, those for its own use (``_name``, ``__main__``) left out."""
    return [name for _, name, is_package in pkgutil.iter_modules(package.__path__) if not is_package and name[0] != "_"]


def api_page(name: str) -> str:
    """Return the page of one package: what its ``__all__`` names, or without one, what its modules define."""
    package = importlib.import_module(name)
    title = name.removeprefix("lightning_moe.")
    lines = [title, "=" * len(title), "", f".. automodule:: {name}", "   :no-members:", ""]
    if hasattr(package, "__all__"):
        heading = f"``from {name} import …``"
        lines += [heading, "-" * len(heading), ""]
        lines += [f".. {directive(package, public)}\n" for public in package.__all__]
    else:
        for module in public_modules(package):
            lines += [module, "-" * len(module), "", *module_section(f"{name}.{module}"), ""]
    return "\n".join(lines) + "\n"


def module_section(name: str) -> list[str]:
    """Return what a package's page says of one module; the adapter needs a package that not everybody installs."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        return [f"``{name}`` needs the package ``{error.name}``, which was not installed where this page was built."]
    return [f".. automodule:: {name}"]


def directive(package: ModuleType, name: str) -> str:
    """Return the autodoc directive for a public name of a package."""
    value = getattr(package, name)
    if isinstance(value, type):
        return f"autoclass:: {package.__name__}.{name}"
    if callable(value):
        return f"autofunction:: {package.__name__}.{name}"
    modules = (importlib.import_module(f"{package.__name__}.{module}") for module in public_modules(package))
    home = next(m for m in modules if re.search(rf"^{name}\b.* = ", inspect.getsource(m), re.MULTILINE))
    return f"autodata:: {home.__name__}.{name}\n   :no-value:"  # its comment ``#:`` stands where it is defined


def write_api_pages() -> None:
    """Write a page for each package into ``api/``; a new package gets one by being there."""
    API.mkdir(exist_ok=True)
    modules = pkgutil.iter_modules(lightning_moe.__path__, "lightning_moe.")
    names = ["lightning_moe", *(module.name for module in modules if module.ispkg)]
    for old in set(API.glob("*.rst")) - {API / f"{name}.rst" for name in names}:
        old.unlink()
    for name in names:
        page, text = API / f"{name}.rst", api_page(name)
        if not page.exists() or page.read_text() != text:
            page.write_text(text)


def page_of_the_root(app, docname, source):
    """Put README.md before the table of contents, and CONTRIBUTING.md into its page, with their links set right."""
    if docname in PAGES_OF_THE_ROOT:
        text = (REPOSITORY / PAGES_OF_THE_ROOT[docname]).read_text()
        text = text.replace("(docs/", "(").replace("(CONTRIBUTING.md)", "(contributing.md)")
        source[0] = text + source[0]


def only_names_are_references(app, what, name, obj, options, lines):
    """Make a literal of what stands in single backticks and is no name (a key, a flag), and let |A| be |A|."""
    for number, line in enumerate(lines):
        line = re.sub(r"(?<![`:\w])`([^`]+)`(?![`_])", _reference_or_literal, line)
        parts = re.split(r"(``.*?``)", line)
        lines[number] = "".join(part if part.startswith("``") else part.replace("|", r"\|") for part in parts)


def _reference_or_literal(match: re.Match[str]) -> str:
    return match[0] if re.fullmatch(r"[A-Za-z_][\w.]*", match[1]) else f"``{match[1]}``"


def skip_fields_of_named_tuples(app, what, name, obj, skip, options):
    """Skip what says only "Alias for field number 0"; the class describes its fields under "Args"."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app):
    app.connect("source-read", page_of_the_root)
    app.connect("autodoc-process-docstring", only_names_are_references)
    app.connect("autodoc-skip-member", skip_fields_of_named_tuples)


write_api_pages()
