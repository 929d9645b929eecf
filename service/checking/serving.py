"""How a job's checkpoints can be served, read from what its export stage left."""

from __future__ import annotations

from sqlalchemy import Engine as Database

from pdtrim.contract.errors import InvalidRequest, NoCheckpoints
from pdtrim.contract.jobs import StageName, StageStatus
from pdtrim.contract.manifests import ManifestOptions
from pdtrim.contract.results import Half
from pdtrim.serving.checkpoints import NotServable, ServedCheckpoint, default_sizes, paired, read_checkpoint
from pdtrim.serving.deployment import IMAGE, Deployment, Store
from pdtrim.serving.engines import Serving
from service.db import artifacts, jobs
from service.db.session import transaction
from service.db.tables import ArtifactRow
from service.settings import Settings
from service.storage import ArtifactStore

FILES = ("pdtrim.json", "config.json")


def read_deployment(
    database: Database, store: ArtifactStore, settings: Settings, job_id: str, options: ManifestOptions
) -> Deployment:
    """The job's pair as manifests are written of it.

    Raises: JobNotFound, NoCheckpoints, InvalidRequest, ObjectNotFound, StoreUnavailable.
    """
    with transaction(database) as session:
        jobs.get(session, job_id)
        rows = {row.name: row for row in artifacts.of_stage(session, job_id, StageName.EXPORT)}
        export = next(row for row in jobs.stages(session, [job_id])[job_id] if row.name == StageName.EXPORT)
    folders = _folders(rows)
    if folders is None:
        raise NoCheckpoints(
            f"Job {job_id} has no checkpoints to serve: its stage export, which writes them, is "
            f"{StageStatus(export.status)}. GET /v1/jobs/{{id}}/events says how far it is."
        )
    read = {folder: _read(store, rows, folder) for folder in folders.values()}
    try:
        pair = paired(read[folders["prefill"]], read[folders["decode"]])
        sizes = default_sizes(pair, sequences=options.sequences, tokens=options.tokens)
    except NotServable as error:
        raise InvalidRequest(f"Not to be served so: {error}.", param="tokens" if options.tokens else None) from error
    place = rows[f"{folders['decode']}/{FILES[0]}"].uri.removesuffix(f"/{folders['decode']}/{FILES[0]}")
    bucket = place.startswith("s3://")
    return Deployment(
        job=job_id,
        serving=Serving(pair, pair.name, sizes, options.device),
        folders=folders,
        store=Store(
            place,
            endpoint_url=settings.s3_endpoint_url if bucket else None,
            region=settings.s3_region if bucket else None,
            public_endpoint_url=settings.s3_public_endpoint_url if bucket else None,
        ),
        image=options.image or IMAGE,
    )


def _folders(rows: dict[str, ArtifactRow]) -> dict[Half, str] | None:
    """The folder of each half's checkpoint; None where there are none."""
    for prefill, decode in (("unified", "unified"), ("prefill", "decode")):
        if all(f"{folder}/{file}" in rows for folder in (prefill, decode) for file in FILES):
            return {"prefill": prefill, "decode": decode}
    return None


def _read(store: ArtifactStore, rows: dict[str, ArtifactRow], folder: str) -> ServedCheckpoint:
    """Raises: InvalidRequest for one that an earlier version wrote in another form."""
    made, config = (store.get_bytes(rows[f"{folder}/{file}"].key) for file in FILES)
    held = sum(row.size for name, row in rows.items() if name.startswith(f"{folder}/"))
    try:
        return read_checkpoint(made, config, bytes_=held)
    except NotServable as error:
        raise InvalidRequest(f"The checkpoint {folder} cannot be served: {error}.") from error
