"""Prints what pyproject.toml requires with the extras given, so that images install it before the source is there."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
wanted = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in sys.argv[1:])]
print(*sorted({requirement for group in wanted for requirement in group}), sep="\n")
