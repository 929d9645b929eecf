"""Queries on artifacts."""

from __future__ import annotations

from sqlmodel import Session, col, select

from pdtrim.contract.errors import ArtifactNotFound, CursorNotFound
from pdtrim.contract.jobs import StageName
from service.db.tables import ArtifactRow


def get(session: Session, job_id: str, artifact_id: str) -> ArtifactRow:
    """The artifact of a job. Raises: ArtifactNotFound."""
    row = session.exec(select(ArtifactRow).where(ArtifactRow.job_id == job_id, ArtifactRow.id == artifact_id)).first()
    if row is None:
        raise ArtifactNotFound(
            f"Job {job_id} has no artifact {artifact_id}. List them with GET /v1/jobs/{job_id}/artifacts."
        )
    return row


def page(
    session: Session, job_id: str, *, stage: StageName | None, after: str | None, limit: int
) -> tuple[list[ArtifactRow], bool]:
    """Artifacts in the order of their ids (stage by stage), and whether more follow. Raises: CursorNotFound."""
    query = select(ArtifactRow).where(ArtifactRow.job_id == job_id)
    if stage is not None:
        query = query.where(ArtifactRow.stage == stage)
    if after is not None:
        if session.exec(query.where(ArtifactRow.id == after)).first() is None:
            raise CursorNotFound(f"`after` names no artifact of job {job_id}: {after}", param="after")
        query = query.where(ArtifactRow.id > after)
    rows = session.exec(query.order_by(col(ArtifactRow.id)).limit(limit + 1)).all()
    return list(rows[:limit]), len(rows) > limit


def of_stage(session: Session, job_id: str, stage: StageName) -> list[ArtifactRow]:
    """Every artifact that a stage recorded, by name."""
    return list(
        session.exec(
            select(ArtifactRow)
            .where(ArtifactRow.job_id == job_id, ArtifactRow.stage == stage)
            .order_by(col(ArtifactRow.name))
        ).all()
    )


def named(session: Session, job_id: str, stage: StageName, name: str) -> ArtifactRow | None:
    """The artifact of that name, if the stage has recorded it."""
    return session.exec(
        select(ArtifactRow).where(ArtifactRow.job_id == job_id, ArtifactRow.stage == stage, ArtifactRow.name == name)
    ).first()
