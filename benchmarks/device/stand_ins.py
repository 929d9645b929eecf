"""Packages that the stages' modules import, and that a job on files of one machine never calls.

Where they are not installed, empty ones stand in: a machine that is lent for minutes needs no database and no web.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

NEVER_CALLED = frozenset({"alembic", "boto3", "botocore", "httpx2", "matplotlib", "sqlalchemy", "sqlmodel", "tenacity"})

WANTS_A_VERSION = ("service.sources.hub",)


class _Empty(ModuleType):
    """Any name in it is a class of its own, which can be caught, derived from and made."""

    def __getattr__(self, name: str) -> type[Exception]:
        if name.startswith("__"):
            raise AttributeError(name)
        found = type(name, (Exception,), {"__init__": lambda self, *given, **named: None})
        setattr(self, name, found)
        return found


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in NEVER_CALLED:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing in it."""


def stand_in() -> None:
    """From now on what is not installed is empty; what is installed is found as before."""
    sys.meta_path.append(_Finder())
    for module in WANTS_A_VERSION:
        try:
            import_module(module)
        except ImportError:  # Of what is installed it wants another version.
            sys.modules[module] = _Empty(module)


def is_installed(package: str) -> bool:
    """Whether the package itself is there."""
    return not isinstance(sys.modules.get(package), _Empty)


def say_installed(folder: Path) -> None:
    """Have the project's version found, which its results name, where it is not installed."""
    about = folder / "pdtrim-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: pdtrim\nVersion: 0\n")
    sys.path.append(str(folder))
