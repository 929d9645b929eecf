from __future__ import annotations

from functools import cache

import pytest
from kubernetes_validate import utils

_schema_contents = cache(utils.schema_contents)


@pytest.fixture(autouse=True)
def _schemas_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise all definitions, some megabytes, are read again for each document."""
    monkeypatch.setattr(utils, "schema_contents", _schema_contents)
