"""Takes publications that are due to their targets, and records what came of it.

A failure never touches the job. It is tried again after longer and longer pauses, and shown with the publication.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial

from sqlalchemy import Engine as Database

from pdtrim.contract.publications import PublicationTarget
from service.checking.targets import check_push
from service.db import artifacts, jobs, publications, views
from service.db.publications import PublicationClaim, PublicationLost
from service.db.session import DATABASE_FAULTS, transaction
from service.settings import Settings
from service.storage import ArtifactStore
from service.upkeep.publishing import hub, tracking
from service.upkeep.publishing.record import Record

LEASE = timedelta(minutes=15)
"""Longer than one file takes."""
DELAYS = tuple(timedelta(seconds=seconds) for seconds in (30, 2 * 60, 10 * 60, 3600, 4 * 3600, 12 * 3600))
MAX_TRIES = len(DELAYS) + 1
MAX_ERROR = 2000
log = logging.getLogger(__name__)


def publish(database: Database, settings: Settings, store: ArtifactStore) -> int:
    """Make one attempt at everything that is due; returns how many were made. Raises: what the database raises."""
    made = 0
    while True:
        with transaction(database) as session:
            claim = publications.claim(session, lease=LEASE, max_tries=MAX_TRIES)
        if claim is None:
            return made
        _attempt(database, settings, store, claim)
        made += 1


def _attempt(database: Database, settings: Settings, store: ArtifactStore, claim: PublicationClaim) -> None:
    try:
        urls = TAKERS[claim.target](_record(database, settings, store, claim), settings)
        _conclude(database, partial(publications.succeed, claim=claim, urls=urls))
        log.info("published", extra={"job_id": claim.job_id, "target": claim.target.value})
    except (PublicationLost, *DATABASE_FAULTS):
        # Not the target's fault: it falls due again when the lease has run out, if it is still there.
        log.warning("a publication was interrupted", extra={"job_id": claim.job_id, "target": claim.target.value})
    except Exception as error:
        # The border of the service: whatever a target or its library raises is an answer of that target.
        log.warning("publishing failed", exc_info=True, extra={"job_id": claim.job_id, "target": claim.target.value})
        told = f"{type(error).__name__}: {error}"[:MAX_ERROR]
        retry_in = DELAYS[claim.tries - 1] if claim.tries < MAX_TRIES else None
        _conclude(database, partial(publications.fail, claim=claim, error=told, retry_in=retry_in))


def _conclude(database: Database, change: Callable[..., None]) -> None:
    try:
        with transaction(database) as session:
            change(session)
    except PublicationLost as error:
        log.warning("stepping back: %s", error)


def _record(database: Database, settings: Settings, store: ArtifactStore, claim: PublicationClaim) -> Record:
    def renew() -> None:
        with transaction(database) as session:
            publications.renew(session, claim, lease=LEASE)

    with transaction(database) as session:
        publications.renew(session, claim, lease=LEASE)
        job = views.job(jobs.get(session, claim.job_id), jobs.stages(session, [claim.job_id])[claim.job_id])
        stages = [stage.name for stage in job.stages]
        rows = [row for stage in stages for row in artifacts.of_stage(session, claim.job_id, stage)]
    assert settings.scratch_dir is not None
    return Record(job, rows, store, settings.scratch_dir / "publishing", renew)


def _to_hub(record: Record, settings: Settings) -> list[str]:
    push = record.job.spec.push_to_hub
    if push is None:
        raise ValueError("the job names no repository in push_to_hub")
    check_push(record.job.spec, settings)
    return hub.publish(record, push, settings)


TAKERS: Mapping[PublicationTarget, Callable[[Record, Settings], list[str]]] = {
    PublicationTarget.MLFLOW: tracking.publish,
    PublicationTarget.HUB: _to_hub,
}
