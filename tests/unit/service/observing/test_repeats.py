from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from service.observing import repeats
from service.settings import Settings
from tests.observing import lines, logged


def test_warnings_that_repeat_are_counted_and_all_else_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    log = logging.getLogger("service.api.somewhere")
    with logged(Settings(data_dir=tmp_path, log_format="json")) as stream:
        for number in range(500):
            log.warning("refused %d", number)
            log.info("request", extra={"number": number})
        log.warning("another kind")
        now[0] = repeats.WINDOW_SECONDS
        log.warning("refused %d", 500)
    found = lines(stream)

    refused = [line for line in found if line["event"].startswith("refused")]
    assert len(refused) == repeats.AS_THEY_ARE + 1
    assert refused[repeats.AS_THEY_ARE - 1]["repeats"] == "more of these within 60 s are counted, not logged"
    assert refused[-1]["left_out"] == 500 - repeats.AS_THEY_ARE
    assert sum(line["event"] == "request" for line in found) == 500
    assert sum(line["event"] == "another kind" for line in found) == 1
