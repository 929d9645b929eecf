from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from pdtrim.contract.jobs import JobStatus, StageName, StageStatus
from service.db.tables import JobRow, StageRow
from service.db.views import estimated_finish

START = datetime(2026, 1, 5, 10, 0, tzinfo=UTC)


def estimate(job: JobStatus, progress: float, stage: StageStatus = StageStatus.RUNNING) -> datetime | None:
    """What is estimated ten seconds into a stage."""
    row = JobRow(id="job", status=job, spec={}, labels={})
    running = StageRow(
        job_id="job", name=StageName.REMOVAL, position=1, status=stage, progress=progress, started_at=START
    )
    waiting = StageRow(job_id="job", name=StageName.EXPORT, position=3, status=StageStatus.PENDING)
    return estimated_finish(row, [running, waiting], at=START + timedelta(seconds=10))


def test_a_quarter_in_ten_seconds_promises_thirty_more() -> None:
    assert estimate(JobStatus.RUNNING, 0.25) == START + timedelta(seconds=40)


def test_full_progress_promises_the_present() -> None:
    assert estimate(JobStatus.RUNNING, 1.0) == START + timedelta(seconds=10)


@pytest.mark.parametrize("progress", [0.0, 1e-300, 0.009])
def test_hardly_any_progress_promises_nothing(progress: float) -> None:
    assert estimate(JobStatus.RUNNING, progress) is None


@pytest.mark.parametrize("job", [JobStatus.QUEUED, JobStatus.CANCELLING, JobStatus.CANCELLED, JobStatus.FAILED])
def test_a_job_that_does_not_run_promises_nothing(job: JobStatus) -> None:
    assert estimate(job, 0.5) is None


def test_a_job_between_two_stages_promises_nothing() -> None:
    assert estimate(JobStatus.RUNNING, 0.5, StageStatus.SUCCEEDED) is None
