"""Pauses and cancellations while a worker waits for something slow: within 5 s in every kind of work.

On real PostgreSQL and S3, behind a proxy that slows S3 down; the hub is a stand-in. Each piece of work would take
minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest
from sqlmodel import Session

from pdtrim.contract.jobs import JobStatus, StageName, StageStatus
from pdtrim.contract.results import Result
from pdtrim.contract.spec import JobSpec
from service.db import jobs
from service.db.session import connect, transaction
from service.db.tables import JobRow, StageRow
from service.settings import Settings
from service.sources import download
from service.storage import ArtifactStore, multipart, open_store
from service.storage.s3 import s3_client
from tests.faults.proxy import Proxy
from tests.found import RESULTS
from tests.hub import COMMIT, REPOSITORY, arriving_bytes, serve_hub, use_hub
from tests.processes import wait_until
from tests.running import run_stage
from tests.servers import S3Server
from tests.stored_jobs import store_job
from tests.tiny_job import tiny_spec, write_tiny_model
from workers.running.attempt import Worker
from workers.stages import STAGES
from workers.stages.context import StageContext

PROMISED_S = 5.0
MARGIN_S = 3.0
"""For a machine that does much else."""
UNDISTILLED = {"enabled": False}
SLOW = 32_768.0
"""Bytes a second: a tiny checkpoint takes more than half a minute, a part of an upload eight."""


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[Proxy]:
    with Proxy(urlsplit(s3.endpoint_url).port or 0) as proxy:
        yield proxy


@pytest.fixture
def worker(
    proxy: Proxy, s3: S3Server, s3_url: str, postgres_database_url: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Worker]:  # fmt: skip
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    settings = Settings(
        data_dir=tmp_path / "data",
        database_url=postgres_database_url,
        artifacts_url=s3_url,
        s3_endpoint_url=f"http://127.0.0.1:{proxy.port}",
        allowed_sources=["builtin:", "hf://", tmp_path.as_uri()],
    )
    database = connect(settings.database_url)
    yield Worker(settings, database, open_store(s3_url, endpoint_url=settings.s3_endpoint_url), name="test")
    database.dispose()


def create(worker: Worker, spec: dict[str, Any], revision: str | None = None) -> str:
    with transaction(worker.database) as session:
        return store_job(session, JobSpec.model_validate(spec), model_revision=revision).id


def stage_row(worker: Worker, job_id: str, stage: StageName) -> StageRow:
    with transaction(worker.database) as session:
        return session.get_one(StageRow, (job_id, stage))


def succeed(worker: Worker, job_id: str, *names: StageName) -> None:
    for stage in names:
        run_stage(worker, job_id, stage)
        assert stage_row(worker, job_id, stage).status == StageStatus.SUCCEEDED


def resume(worker: Worker, job_id: str, stage: StageName) -> None:
    with transaction(worker.database) as session:
        assert jobs.resume(session, job_id)[1] == stage


Ask = Callable[[Session, str], JobRow]


@pytest.fixture
def stop(worker: Worker, record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Runs a stage, and stops its job once the work has come `so_far`."""

    def stop(job_id: str, stage: StageName, so_far: Callable[[], bool], ask: Ask, work: str) -> None:
        running = Thread(target=run_stage, args=(worker, job_id, stage), daemon=True)
        running.start()
        wait_until(so_far, what=f"{work} to be on its way")
        ended = JobStatus.PAUSED if ask is jobs.request_pause else JobStatus.CANCELLED
        asked_at = time.monotonic()
        with transaction(worker.database) as session:
            ask(session, job_id)

        def has_ended() -> bool:
            with transaction(worker.database) as session:
                return jobs.get(session, job_id).status == ended

        wait_until(has_ended, seconds=60, what=f"the job to be {ended}")
        seconds = time.monotonic() - asked_at
        record_property(f"{work}: {ended} after", f"{seconds:.1f} s")
        assert seconds < PROMISED_S + MARGIN_S
        running.join(5)
        assert not running.is_alive()
        assert worker.settings.scratch_dir is not None
        assert not list((worker.settings.scratch_dir / "jobs").iterdir())

    return stop


def begun(worker: Worker, job_id: str, stage: StageName) -> Callable[[], bool]:
    return lambda: stage_row(worker, job_id, stage).progress > 0


@pytest.fixture
def at_the_server(s3: S3Server, s3_url: str) -> ArtifactStore:
    """The store, past the proxy."""
    return open_store(s3_url, **s3.options)


def fetched_bytes(worker: Worker) -> int:
    assert worker.settings.scratch_dir is not None
    return sum(arriving_bytes(model) for model in worker.settings.scratch_dir.glob("models/*"))


def test_a_fetch_from_a_slow_hub_is_paused_and_goes_on_where_it_was(
    worker: Worker, stop: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = 1 << 15
    monkeypatch.setattr(download, "PART_BYTES", part)
    files = {path.name: path.read_bytes() for path in write_tiny_model(tmp_path / "tiny").iterdir()}
    weights = "model.safetensors"
    with serve_hub(files) as hub:
        use_hub(monkeypatch, hub.url)
        spec = tiny_spec(tmp_path) | {"model": f"hf://{REPOSITORY}"}
        job_id = create(worker, spec, COMMIT)
        hub.slow = {weights: part // 2}

        def coming() -> bool:
            return weights in {name for name, _ in hub.downloads} and fetched_bytes(worker) >= part

        stop(job_id, StageName.SCORING, coming, jobs.request_pause, "fetch")
        kept = fetched_bytes(worker)
        hub.slow = {}
        hub.downloads.clear()
        resume(worker, job_id, StageName.SCORING)
        succeed(worker, job_id, StageName.SCORING)
        starts = [int((wanted or "bytes=0-").removeprefix("bytes=").partition("-")[0])
                  for name, wanted in hub.downloads if name == weights]  # fmt: skip
        assert min(starts) == kept >= part


def test_a_hub_that_says_nothing_holds_up_no_cancellation(
    worker: Worker, stop: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in write_tiny_model(tmp_path / "tiny").iterdir()}
    with serve_hub(files) as hub:
        use_hub(monkeypatch, hub.url)
        hub.stalled = {"model.safetensors": 1000}
        job_id = create(worker, tiny_spec(tmp_path) | {"model": f"hf://{REPOSITORY}"}, COMMIT)
        asked = lambda: "model.safetensors" in {name for name, _ in hub.downloads}  # noqa: E731
        stop(job_id, StageName.SCORING, asked, jobs.request_cancel, "silent hub")


def test_a_search_is_paused(worker: Worker, stop: Callable[..., None], tmp_path: Path) -> None:
    counts = {"prefill": {"remove_blocks": 6}, "decode": {"remove_blocks": 7}, "search": {"algorithm": "exhaustive"}}
    job_id = create(worker, tiny_spec(write_tiny_model(tmp_path / "tiny", blocks=14), **counts))
    succeed(worker, job_id, StageName.SCORING)
    stop(job_id, StageName.REMOVAL, begun(worker, job_id, StageName.REMOVAL), jobs.request_pause, "search")


def test_training_is_paused(worker: Worker, stop: Callable[..., None], tmp_path: Path) -> None:
    training = {"heal_tokens": 10**8, "batch_windows": 4, "threshold": 1.0}
    job_id = create(worker, tiny_spec(write_tiny_model(tmp_path / "tiny"), distillation=training))
    succeed(worker, job_id, StageName.SCORING, StageName.REMOVAL)
    stage = StageName.DISTILLATION
    stop(job_id, stage, begun(worker, job_id, stage), jobs.request_pause, "training")


def test_upload_download_and_evaluation_are_paused_and_cancelled(
    worker: Worker, proxy: Proxy, at_the_server: ArtifactStore, stop: Callable[..., None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("workers.stages.context.PROGRESS_INTERVAL_S", 0.0)
    endless = {"windows": 4, "speed_tokens": 4096, "speed_repeats": 100}
    spec = tiny_spec(write_tiny_model(tmp_path / "tiny"), distillation=UNDISTILLED, evaluation=endless)
    job_id = create(worker, spec)
    succeed(worker, job_id, StageName.SCORING, StageName.REMOVAL, StageName.DISTILLATION)

    def uploading() -> bool:
        return f"jobs/{job_id}/export/1/decode/config.json" in at_the_server.list_keys(f"jobs/{job_id}/export")

    proxy.slow_down(SLOW)
    stop(job_id, StageName.EXPORT, uploading, jobs.request_pause, "upload")
    proxy.mend()
    resume(worker, job_id, StageName.EXPORT)
    succeed(worker, job_id, StageName.EXPORT)

    def downloading() -> bool:
        assert worker.settings.scratch_dir is not None
        return bool(list(worker.settings.scratch_dir.glob("jobs/*-evaluation-*/in/export/*/model.safetensors*")))

    proxy.slow_down(SLOW)
    stop(job_id, StageName.EVALUATION, downloading, jobs.request_pause, "download")
    proxy.mend()
    resume(worker, job_id, StageName.EVALUATION)

    def measuring() -> bool:
        return stage_row(worker, job_id, StageName.EVALUATION).message == "Measuring speed."

    stop(job_id, StageName.EVALUATION, measuring, jobs.request_cancel, "evaluation")


def write_large_file(context: StageContext) -> Result:
    """Three parts of an upload."""
    with (context.out / "large").open("wb") as file:
        file.truncate(3 * multipart.PART_BYTES)
    return RESULTS[StageName.SCORING]


@pytest.mark.parametrize("slow", [True, False])
def test_an_upload_in_parts_is_stopped_and_leaves_none(
    slow: bool, worker: Worker, proxy: Proxy, s3: S3Server, s3_url: str, stop: Callable[..., None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(STAGES, StageName.SCORING, write_large_file)
    job_id = create(worker, tiny_spec(write_tiny_model(tmp_path / "tiny")))
    client, prefix = s3_client(**s3.options), urlsplit(s3_url).path.strip("/")

    def unfinished() -> bool:
        return bool(client.list_multipart_uploads(Bucket=s3.bucket, Prefix=prefix).get("Uploads"))

    def in_the_middle() -> bool:
        if slow or not unfinished():
            return unfinished()
        proxy.stall()
        return True

    proxy.slow_down(SLOW if slow else 64 * SLOW)
    stop(job_id, StageName.SCORING, in_the_middle, jobs.request_cancel, "slow parts" if slow else "silent store")
    proxy.mend()
    wait_until(lambda: not unfinished(), seconds=10, what="the upload to be aborted")
