"""Databases of every earlier version move forward with what is in them, on SQLite and on PostgreSQL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import Engine as Database
from sqlalchemy import text

from pdtrim.contract.jobs import RESULTS, JobStatus, StageName
from pdtrim.contract.spec import JobSpec
from service.db import jobs, stages
from service.db.session import MIGRATIONS, connect, migrate, schema_is_current, transaction
from service.settings import Settings
from tests.earlier import EARLIER
from tests.gateway import serve, write_model

DONE, WAITING = "job_" + "1" * 32, "job_" + "2" * 32
ARTIFACT = "art_" + "3" * 32
FOUND = EARLIER["pair"]["metrics"]
SPEC = {"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}}
AT = "2026-01-02 03:04:05+00:00"
REVISIONS = [script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()][:0:-1]
"""Every revision but the newest, oldest first."""


def _rows() -> Iterator[tuple[str, dict[str, object]]]:
    """A finished job and a queued one, in the columns of the first version."""
    for job_id, status, done in ((DONE, "succeeded", True), (WAITING, "queued", False)):
        yield (
            "jobs",
            {
                "id": job_id, "status": status, "spec": json.dumps(SPEC), "labels": json.dumps({"team": "serving"}),
                "versions": json.dumps({"torch": "2.13.0"} if done else {}), "last_event": 1, "created_at": AT,
                "finished_at": AT if done else None,
            },
        )  # fmt: skip
        yield (
            "events",
            {
                "job_id": job_id, "number": 1, "type": "job.created", "message": "Job created.", "data": "{}",
                "created_at": AT,
            },
        )  # fmt: skip
        for position, name in enumerate(StageName):
            stage = "succeeded" if done else ("queued" if position == 0 else "pending")
            yield (
                "stages",
                {
                    "job_id": job_id, "name": name.value, "position": position, "status": stage,
                    "attempt": int(done), "sends": 1, "progress": float(done), "message": "",
                    "metrics": json.dumps(FOUND[name] if done else {}),
                },
            )  # fmt: skip
    yield (
        "artifacts",
        {
            "id": ARTIFACT, "job_id": DONE, "stage": "removal", "name": "plan.json", "key": f"jobs/{DONE}/removal/1/p",
            "uri": "file:///p", "size": 2, "sha256": "0" * 64, "created_at": AT,
        },
    )  # fmt: skip


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.db"
    url: str = request.getfixturevalue("empty_postgres_database_url")
    return url


def _fill(database: Database, revision: str) -> None:
    migrate(database, revision)
    with database.begin() as connection:
        for table, row in _rows():
            columns, values = ", ".join(row), ", ".join(f":{name}" for name in row)
            connection.execute(text(f"INSERT INTO {table} ({columns}) VALUES ({values})"), row)


@pytest.mark.parametrize("revision", REVISIONS)
def test_what_an_earlier_version_left_is_read_and_worked_on_after_the_migration(
    database_url: str, revision: str, tmp_path: Path
) -> None:
    database = connect(database_url)
    _fill(database, revision)
    assert not schema_is_current(database)

    settings = Settings(data_dir=tmp_path / "data", database_url=database_url)
    with serve(settings, write_model(tmp_path / "tiny")) as gateway:
        listed = gateway.client.get("/v1/jobs", params={"metadata[team]": "serving"}).json()
        done = gateway.client.get(f"/v1/jobs/{DONE}").json()
        events = gateway.client.get(f"/v1/jobs/{DONE}/events").json()
        artifacts = gateway.client.get(f"/v1/jobs/{DONE}/artifacts").json()
        page = gateway.client.get(f"/ui/jobs/{DONE}").text
        gateway.run(WAITING)
        waiting = gateway.client.get(f"/v1/jobs/{WAITING}").json()

    assert schema_is_current(database)
    assert [job["id"] for job in listed["data"]] == [WAITING, DONE]
    assert (done["status"], done["versions"]) == (JobStatus.SUCCEEDED, {"torch": "2.13.0"})
    # What an earlier version measured had prefill say the first token, and no copying in its calibration.
    as_it_was = {**SPEC, "serving": {"first_token": "prefill"}, "calibration": {"copying": 0.0}}
    assert JobSpec.model_validate(done["spec"]) == JobSpec.model_validate(as_it_was)
    for stage in done["stages"]:
        assert stage["metrics"] == RESULTS[stage["name"]].model_validate(FOUND[stage["name"]]).model_dump(mode="json")
    assert "The pair beside its controls" in page
    assert [event["type"] for event in events["data"]] == ["job.created"]
    assert [artifact["id"] for artifact in artifacts["data"]] == [ARTIFACT]
    assert waiting["status"] == JobStatus.SUCCEEDED
    with transaction(database) as session:
        assert stages.claim(session, DONE, StageName.SCORING, worker="test", lease_seconds=1) is None
    database.dispose()


def test_what_a_job_kept_before_there_were_quotas_counts(database_url: str) -> None:
    database = connect(database_url)
    _fill(database, "0005")
    with database.begin() as connection:
        connection.execute(text("UPDATE artifacts SET size = 5000000000"))

    migrate(database)

    with transaction(database) as session:
        assert [jobs.get(session, job_id).artifact_bytes for job_id in (DONE, WAITING)] == [5_000_000_000, 0]
    database.dispose()


def test_a_schema_of_a_newer_version_is_left_as_it_is_and_worked_with(database_url: str) -> None:
    database = connect(database_url)
    migrate(database)
    with database.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'from-the-future'"))

    migrate(database)
    assert schema_is_current(database)
    database.dispose()
