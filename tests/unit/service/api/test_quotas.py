"""What a gateway answers to those who have used up their quotas, and what it sends to the broker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdtrim.contract.access import Quotas, Scope
from pdtrim.contract.jobs import StageName
from service.db import keys, stages
from service.db.session import transaction
from service.settings import Settings
from service.upkeep.reconciler import sweep
from tests.gateway import Gateway, problem_of, serve
from tests.processes import wait_until

REUSABLE = {"Idempotency-Key": "one"}


@pytest.fixture
def small(gateway_settings: Settings, model: Path) -> Iterator[Gateway]:
    """A gateway whose projects have one job running, two queued and ten bytes; its reconciler sleeps."""
    most = {"max_running_jobs": 1, "max_queued_jobs": 2, "max_artifact_bytes": 10}
    changes = {**most, "reconcile_in_gateway": False, "resend_seconds": 0.05}
    with serve(gateway_settings.model_copy(update=changes), model) as running:
        yield running


def submit(gateway: Gateway, headers: dict[str, str] | None = None) -> Any:
    return gateway.client.post("/v1/jobs", json=dict(gateway.spec), headers=headers)


def messages(gateway: Gateway) -> int:
    """How many messages the broker has been given."""
    folder = gateway.settings.data_dir / "broker" / "messages"
    return len(list(folder.iterdir())) if folder.exists() else 0


def test_beyond_the_queue_quota_a_job_is_refused_and_its_idempotency_key_is_free_again(small: Gateway) -> None:
    first = small.create()
    small.create()

    refused = submit(small, REUSABLE)
    small.client.post(f"/v1/jobs/{first}/cancel")
    accepted = submit(small, REUSABLE)
    again = submit(small, REUSABLE)

    assert "2 queued jobs" in problem_of(refused, 429, "queue_quota_exceeded")["detail"]
    assert refused.headers["retry-after"] == "60"
    assert (accepted.status_code, again.status_code) == (201, 201)
    assert again.json()["id"] == accepted.json()["id"]


def test_a_resume_beyond_the_queue_quota_is_refused(small: Gateway) -> None:
    job_id = small.create()
    small.client.post(f"/v1/jobs/{job_id}/pause")
    for _ in range(2):
        small.create()

    problem_of(small.client.post(f"/v1/jobs/{job_id}/resume"), 429, "queue_quota_exceeded")
    assert small.client.get(f"/v1/jobs/{job_id}").json()["status"] == "paused"


def test_beyond_the_bytes_quota_a_job_is_refused_until_another_is_deleted(small: Gateway) -> None:
    job_id = small.create()
    for stage in StageName:
        small.store(job_id, stage, {"plan.json": b"{}"})

    refused = submit(small)
    small.client.delete(f"/v1/jobs/{job_id}")

    assert "10 bytes" in problem_of(refused, 429, "artifact_quota_exceeded")["detail"]
    assert refused.headers["retry-after"] == "3600"
    assert submit(small).status_code == 201


def test_the_quotas_of_the_key_that_is_sent_hold_too(small: Gateway) -> None:
    with transaction(small.database) as session:
        most = Quotas(max_queued_jobs=1)
        key = keys.create(session, project="ours", name="ci", scopes={Scope.SUBMIT}, quotas=most)[1]
    headers = {"Authorization": f"Bearer {key}"}

    answers = [submit(small, headers) for _ in range(2)]

    assert answers[0].status_code == 201
    assert f"The key {key.split('_')[1]}" in problem_of(answers[1], 429, "queue_quota_exceeded")["detail"]


def test_a_job_that_has_to_wait_is_sent_when_it_may_run(small: Gateway) -> None:
    running, waiting = small.create(), small.create()
    claim = small.claim(running, StageName.SCORING)

    shown = small.client.get(f"/v1/jobs/{waiting}").json()
    assert shown["status"] == "queued"
    assert shown["stages"][0]["message"].startswith("Waits until fewer jobs")
    assert messages(small) == 1
    assert sweep(small.database, small.settings) == 0
    small.client.post(f"/v1/jobs/{running}/cancel")
    with transaction(small.database) as session:
        stages.stopped(session, claim)

    assert sweep(small.database, small.settings) == 1
    assert messages(small) == 2
    small.claim(waiting, StageName.SCORING)


def test_a_gateways_reconciler_wakes_what_waits(gateway_settings: Settings, model: Path) -> None:
    changes = {"max_running_jobs": 1, "reconcile_seconds": 0.05}
    with serve(gateway_settings.model_copy(update=changes), model) as gateway:
        running, _ = gateway.create(), gateway.create()
        gateway.run(running)

        wait_until(lambda: messages(gateway) == 2)
