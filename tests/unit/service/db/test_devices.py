"""What is known of workers, in each kind of database."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import Engine as Database
from sqlmodel import select

from service.db import devices
from service.db.session import transaction
from service.db.tables import DeviceRow, now
from tests.unit.service.checking.test_placement import gpus


def test_a_kind_of_worker_is_one_row_with_what_the_last_of_them_said(database: Database) -> None:
    for speed in (1e12, 2e12):
        with transaction(database) as session:
            devices.saw(session, gpus("default", 80).model_copy(update={"flops": speed}))
            devices.saw(session, gpus("default", 24))
    with transaction(database) as session:
        found = devices.known(session)
    assert {(one.memory_bytes, one.flops) for one in found} == {(80 * 10**9, 2e12), (24 * 10**9, 2e14)}


def test_kinds_that_did_not_come_for_long_are_forgotten(database: Database) -> None:
    with transaction(database) as session:
        devices.saw(session, gpus("default", 24))
        for row in session.exec(select(DeviceRow)):
            row.seen_at = now() - devices.KNOWN_FOR - timedelta(hours=1)
    with transaction(database) as session:
        assert devices.known(session) == []
        devices.saw(session, gpus("default", 80))
        assert len(session.exec(select(DeviceRow)).all()) == 1
