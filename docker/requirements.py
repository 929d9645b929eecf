"""Prints what pyproject.toml requires with the extras given, so that images install it before the source is there."""

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]


def required(extra: str) -> Iterator[str]:
    """What an extra brings, other extras of ours resolved."""
    for requirement in PROJECT["optional-dependencies"][extra]:
        if requirement.startswith("pdtrim["):
            yield from required(requirement.removeprefix("pdtrim[").removesuffix("]"))
        else:
            yield requirement


print(*sorted({*PROJECT["dependencies"], *(one for extra in sys.argv[1:] for one in required(extra))}), sep="\n")
