"""What is installed is what is here: the packages are listed by hand, because ``conf/`` becomes one of them."""

import tomllib
from pathlib import Path

import lightning_moe

SOURCE = Path(lightning_moe.__file__).parent


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((SOURCE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    here = {".".join(path.parent.relative_to(SOURCE.parent).parts) for path in SOURCE.rglob("__init__.py")}
    assert here == set(listed) - {"lightning_moe.conf"}
