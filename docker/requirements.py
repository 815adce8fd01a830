"""Print the dependencies of pyproject.toml in the working directory, and those of the extras named as arguments.

With them the image's packages are one layer and the code another: a change of code does not install torch again.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for group in (project["dependencies"], *(project["optional-dependencies"][extra] for extra in sys.argv[1:])):
    print(*group, sep="\n")
