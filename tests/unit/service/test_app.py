from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from service.settings import Settings
from tests.gateway import model, serve

__all__ = ["model"]


def eventually(happened: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.02)
    return happened()


def test_the_reconciler_outlives_a_failure_and_sends_what_no_worker_got(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(
        data_dir=tmp_path / "data", allowed_sources=["builtin:", model.as_uri()], reconcile_seconds=0.05
    )
    messages = settings.data_dir / "broker" / "messages"

    with caplog.at_level(logging.ERROR, "service.upkeep.reconciler"), serve(settings, model) as gateway:
        job_id = gateway.create()
        for message in messages.iterdir():
            message.unlink()
        with gateway.database.begin() as connection:
            connection.execute(text("UPDATE stages SET sent_at = NULL WHERE name = 'scoring'"))
            connection.execute(text("ALTER TABLE stages RENAME TO hidden"))
        failed = eventually(lambda: "the reconciler failed" in caplog.text)
        with gateway.database.begin() as connection:
            connection.execute(text("ALTER TABLE hidden RENAME TO stages"))
        sent = eventually(lambda: any(job_id in message.read_text() for message in messages.iterdir()))

    assert failed
    assert sent
