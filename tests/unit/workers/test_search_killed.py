from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.training
def test_a_search_killed_at_random_moments_ends_with_the_plan_of_the_unbroken_run(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The script itself compares the plans, byte by byte; run it by hand for more kills."""
    # Coverage takes a quarter more CPU time, and learns nothing from a process that is killed.
    unmeasured = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.search_killed", str(tmp_path), "3", "0"],
        cwd=ROOT,
        env=unmeasured,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("killed 3 times")
    record_property("A search", done.stdout.strip())
