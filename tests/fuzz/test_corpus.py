"""What fuzzing began with and what it found, once more; `make fuzz` looks for more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

HERE = Path(__file__).parent
INPUTS = sorted(path for kind in ("seeds", "corpus") for path in HERE.glob(f"{kind}/*/*"))


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: path.relative_to(HERE).as_posix())
def test_an_input_that_was_found_is_dealt_with(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())


def test_every_target_has_seeds() -> None:
    assert {path.parent.name for path in INPUTS if path.parent.parent.name == "seeds"} == set(TARGETS)
