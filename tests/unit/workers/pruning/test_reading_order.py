"""The package says in which order it is read."""

from __future__ import annotations

import re
from pathlib import Path

import workers.pruning

FOLDER = Path(workers.pruning.__file__).parent
LINES = (workers.pruning.__doc__ or "").splitlines()


def named() -> list[str]:
    """Files in their order, as `room/file`."""
    found, room = [], ""
    for line in LINES:
        if head := re.match(r"(\w+)/ ", line):
            room = head[1]
        elif file := re.match(r"  (\w+) +\S", line):
            found.append(f"{room}/{file[1]}")
    return found


def test_every_file_has_its_line() -> None:
    files = {path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("*/*.py")}

    assert sorted(named()) == sorted(file for file in files if not file.endswith("__init__"))


def test_a_file_comes_after_what_it_imports() -> None:
    order = named()
    imported = re.compile(r"^from workers\.pruning\.(\w+)\.(\w+) import", re.MULTILINE)
    late = [
        (file, f"{room}/{name}")
        for place, file in enumerate(order)
        for room, name in imported.findall((FOLDER / f"{file}.py").read_text())
        if order.index(f"{room}/{name}") > place
    ]

    assert late == []
