from __future__ import annotations

import os
from pathlib import Path

import pytest

Environment = dict[str, str]


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """What a `pdtrim` process is started with: nothing of the tester's own configuration, and short leases."""
    # Coverage takes a quarter more CPU time; what is run here other tests run too.
    dropped = ("PDTRIM_", "AWS_", "COVERAGE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {
        "PDTRIM_DATA_DIR": str(tmp_path / "data"),
        "PDTRIM_LEASE_SECONDS": "8",
        "PDTRIM_RECONCILE_SECONDS": "0.5",
    }
