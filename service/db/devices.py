"""What workers compute on: a row for each kind of them in a queue, written anew whenever one starts.

Rows outlive their workers, since those of a scaler are there only while something waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import delete, select
from sqlmodel import Session, col

from pdtrim.contract.devices import Device
from service.db.tables import DeviceRow, now

KNOWN_FOR = timedelta(days=30)
"""A kind of which none started for as long is forgotten."""


def saw(session: Session, found: Device) -> None:
    """Take down what a worker says that it has."""
    session.merge(DeviceRow(**found.model_dump(), seen_at=now()))
    session.execute(delete(DeviceRow).where(col(DeviceRow.seen_at) < now() - KNOWN_FOR))


def known(session: Session) -> Sequence[Device]:
    """What workers have by all that is known, of each queue those first that came last."""
    rows = session.execute(
        select(DeviceRow)
        .where(col(DeviceRow.seen_at) >= now() - KNOWN_FOR)
        .order_by(col(DeviceRow.queue), col(DeviceRow.seen_at).desc())
    ).scalars()
    return [Device.model_validate(row) for row in rows]
