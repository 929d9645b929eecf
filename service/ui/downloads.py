"""A checkpoint as one file: a tar archive, made while it is sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from tarfile import BLOCKSIZE, GNU_FORMAT, NUL, TarInfo

from fastapi import APIRouter, Depends, Response
from starlette.responses import StreamingResponse

from pdtrim.contract.checkpoints import checkpoint_files
from pdtrim.contract.errors import ArtifactNotFound
from pdtrim.contract.jobs import StageName
from service.api.deps import DatabaseDep, JobId, StoreDep
from service.db import artifacts
from service.db.session import transaction
from service.db.tables import ArtifactRow
from service.storage import ArtifactStore, ObjectNotFound, content_disposition
from service.ui.visits import entered

router = APIRouter(prefix="/ui/jobs/{job_id}/checkpoints", include_in_schema=False, dependencies=[Depends(entered)])

END = NUL * (2 * BLOCKSIZE)
"""What an archive ends with."""


class Role(StrEnum):
    """The checkpoints that a job may have."""

    UNIFIED = "unified"
    PREFILL = "prefill"
    DECODE = "decode"


@router.get("/{role}.tar")
def download(job_id: JobId, role: Role, database: DatabaseDep, store: StoreDep) -> Response:
    """Every file of a checkpoint below a folder of its name, as `pdtrim download` fetches them.

    Raises: ArtifactNotFound; ObjectNotFound before anything is sent.
    """
    with transaction(database) as session:
        left = [
            row
            for stage in (StageName.EXPORT, StageName.EVALUATION)
            for row in artifacts.of_stage(session, job_id, stage)
        ]
    files = [row for row in checkpoint_files(left) if row.name.startswith(f"{role}/")]
    if not files:
        raise ArtifactNotFound(f"Job {job_id} has no {role} checkpoint.")
    if gone := [row.key for row in files if not store.exists(row.key)]:
        raise ObjectNotFound(gone[0])
    headers = {
        "Cache-Control": "no-store",
        "Content-Disposition": content_disposition(f"{job_id}-{role}.tar"),
        "Content-Length": str(archive_bytes(files)),
        "Content-Type": "application/x-tar",
        "X-Content-Type-Options": "nosniff",
    }
    return StreamingResponse(archive(store, files), headers=headers)


def archive(store: ArtifactStore, files: Sequence[ArtifactRow]) -> Iterator[bytes]:
    """The archive in chunks. A file that the store cuts short ends it there, so that what was sent is seen to be part.

    Raises: ObjectNotFound, StoreUnavailable.
    """
    for file in files:
        yield _head(file)
        sent = 0
        for chunk in store.read_range(file.key, 0, file.size):
            yield chunk
            sent += len(chunk)
        if sent != file.size:
            raise ObjectNotFound(f"{file.key} has {sent} bytes, recorded were {file.size}")
        yield NUL * (-file.size % BLOCKSIZE)
    yield END


def archive_bytes(files: Sequence[ArtifactRow]) -> int:
    """How long the archive will be."""
    return sum(len(_head(file)) + file.size + -file.size % BLOCKSIZE for file in files) + len(END)


def _head(file: ArtifactRow) -> bytes:
    entry = TarInfo(file.name)
    entry.size = file.size
    entry.mtime = int(file.created_at.timestamp())
    return entry.tobuf(GNU_FORMAT)
