"""The pairs that the tests serve."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vllm_tests.checkpoints import Pairs


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Kept for the next time where PDTRIM_TEST_PAIRS names a folder."""
    kept = os.environ.get("PDTRIM_TEST_PAIRS")
    return Pairs(Path(kept) if kept else tmp_path_factory.mktemp("pairs"))
