from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import select

from pdtrim.contract.jobs import ErrorInfo, StageName
from service.api.problems import MAX_LISTED_ERRORS
from service.db import jobs
from service.db.session import transaction
from service.db.tables import ArtifactRow, EventRow, JobRow, StageRow, now
from service.settings import Settings
from service.upkeep.reconciler import purge
from tests.found import RESULTS
from tests.gateway import Gateway, problem_of, serve


def test_created_job_is_queued_with_its_stages_and_a_location(gateway: Gateway) -> None:
    response = gateway.client.post("/v1/jobs", json={**gateway.spec, "metadata": {"team": "a"}})

    job = response.json()
    assert response.status_code == 201
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["status"] == "queued"
    assert job["metadata"] == {"team": "a"}
    assert [(stage["name"], stage["status"]) for stage in job["stages"]] == [
        ("scoring", "queued"),
        ("removal", "pending"),
        ("distillation", "pending"),
        ("export", "pending"),
        ("evaluation", "pending"),
    ]
    assert gateway.client.get(response.headers["location"]).json() == job


def test_specification_is_shown_with_its_defaults(gateway: Gateway) -> None:
    job = gateway.client.get(f"/v1/jobs/{gateway.create()}").json()

    assert job["spec"]["model"]["source"] == gateway.spec["model"]
    assert job["spec"]["search"]["algorithm"] == "annealing"
    assert job["spec"]["seed"] == 0


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prefill": {"remove_blocks": -1}}, "prefill.remove_blocks"),
        ({"prefill": {"remove_blocks": 10**30}}, "prefill.remove_blocks"),
        ({"prefill": {"remove_blocks": "many"}}, "prefill.remove_blocks"),
        ({"prefill": {"remove_blocks": 3}}, "prefill.remove_blocks"),
        ({"prefil": {"remove_blocks": 3}}, "prefil"),
        ({"model": {"source": ""}}, "model.source"),
        ({"model": "file:///a\x00b"}, "model.source"),
        ({"model": None}, "model"),
        ({"data": {"text": "a\x00b"}}, "data.text"),
        ({"data": {"text": "\ud800"}}, "data.text"),
        ({"metadata": {"team": "\x00"}}, "metadata.team"),
        ({"metadata": {"team": "\ud800"}}, "metadata.team"),
        ({"metadata": {"a b": "c"}}, "metadata.a b"),
        ({"metadata": {f"k{n}": "v" for n in range(17)}}, "metadata"),
        ({"search": {"algorithm": "luck"}}, "search.algorithm"),
        ({"distillation": {"threshold": float("nan")}}, "distillation.threshold"),
        ({"distillation": {"learning_rate": float("inf")}}, "distillation.learning_rate"),
        ({"distillation": {"losses": {"hidden": -1}}}, "distillation.losses.hidden"),
        ({"distillation": {"losses": {"label": float("nan")}}}, "distillation.losses.label"),
        ({"distillation": {"losses": {"kl": 0, "hidden": 0}}}, "distillation.losses"),
        ({"distillation": {"patience": 0}}, "distillation.patience"),
        ({"distillation": {"batch_windows": 2, "gradient_accumulation": 3}}, "distillation.gradient_accumulation"),
        ({"kv_tokens": {}}, "kv_tokens"),
        ({"kv_tokens": {"ratio": 2, "attention": {"threshold": 0.5}}}, "kv_tokens"),
        ({"kv_tokens": {"ratio": 0.5}}, "kv_tokens.ratio"),
        ({"kv_tokens": {"attention": {"first": 4}}}, "kv_tokens.attention.threshold"),
        ({"kv_tokens": {"attention": {"threshold": 0.5, "first": 0, "last": 0}}}, "kv_tokens.attention"),
    ],
)
def test_invalid_field_is_named(refusing: Gateway, changes: dict[str, Any], param: str) -> None:
    response = refusing.client.post(
        "/v1/jobs", content=json.dumps({**refusing.spec, **changes}), headers={"content-type": "application/json"}
    )

    body = problem_of(response, 422, "invalid_request")
    assert body["param"] == param


def test_a_job_waits_in_the_queue_that_it_names_or_in_the_first(gateway_settings: Settings, model: Path) -> None:
    settings = gateway_settings.model_copy(update={"queues": ["gpu-24g", "gpu-80g"]})
    with serve(settings, model) as gateway:
        named = gateway.create(queue="gpu-80g")
        unnamed = gateway.create()
        refused = gateway.client.post("/v1/jobs", json={**gateway.spec, "queue": "default"})

        shown = [gateway.client.get(f"/v1/jobs/{job_id}").json() for job_id in (named, unnamed)]
        with transaction(gateway.database) as session:
            queues = jobs.queues(session, [named, unnamed])

    problem = problem_of(refused, 422, "no_such_queue")
    assert problem["param"] == "queue"
    assert "gpu-24g, gpu-80g" in problem["detail"]
    assert [job["queue"] for job in shown] == ["gpu-80g", "gpu-24g"]
    assert queues == {named: "gpu-80g", unnamed: "gpu-24g"}


def test_every_invalid_field_is_told_at_once(refusing: Gateway) -> None:
    response = refusing.client.post("/v1/jobs", json={"prefill": {"remove_blocks": -1}})

    body = problem_of(response, 422, "invalid_request")
    assert "model: Field required" in body["detail"]
    assert "prefill.remove_blocks: Input should be greater than or equal to 0 (given: -1)" in body["detail"]
    assert [one["param"] for one in body["errors"]] == ["model", "prefill.remove_blocks", "decode"]


def test_what_is_told_of_many_errors_is_bounded(refusing: Gateway) -> None:
    response = refusing.client.post("/v1/jobs", json={**refusing.spec, **{f"x{n}": 1 for n in range(500)}})

    body = problem_of(response, 422, "invalid_request")
    assert body["detail"].endswith("and 495 more errors")
    assert len(body["detail"]) < 1000
    assert [one["param"] for one in body["errors"]] == [f"x{n}" for n in range(MAX_LISTED_ERRORS)]


def test_unknown_job_is_not_found(refusing: Gateway) -> None:
    unknown = "job_" + "0" * 32

    body = problem_of(refusing.client.get(f"/v1/jobs/{unknown}"), 404, "job_not_found")

    assert unknown in body["detail"]


@pytest.mark.parametrize("job_id", ["x", "job_%00", "job_" + "0" * 31 + "%00", "%ED%A0%80", "job_" + "a" * 500])
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("POST", "/cancel"), ("POST", "/resume"), ("DELETE", ""), ("GET", "/events"), ("GET", "/artifacts")],
)
def test_what_cannot_be_an_id_is_not_found(refusing: Gateway, method: str, path: str, job_id: str) -> None:
    problem_of(refusing.client.request(method, f"/v1/jobs/{job_id}{path}"), 404, "job_not_found")


def test_jobs_are_listed_newest_first_in_pages(gateway: Gateway) -> None:
    created = [gateway.create() for _ in range(5)][::-1]

    first = gateway.client.get("/v1/jobs", params={"limit": 2}).json()
    second = gateway.client.get("/v1/jobs", params={"limit": 2, "after": first["last_id"]}).json()
    third = gateway.client.get("/v1/jobs", params={"limit": 2, "after": second["last_id"]}).json()

    pages = [first, second, third]
    assert [job["id"] for page in pages for job in page["data"]] == created
    assert [page["has_more"] for page in pages] == [True, True, False]
    assert (first["first_id"], first["last_id"]) == (created[0], created[1])
    assert len(first["data"][0]["stages"]) == 5


def test_an_empty_list_has_no_ids(refusing: Gateway) -> None:
    page = refusing.client.get("/v1/jobs").json()

    assert page == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


def test_jobs_are_filtered_by_status(gateway: Gateway) -> None:
    gateway.create()
    cancelled = gateway.create()
    gateway.client.post(f"/v1/jobs/{cancelled}/cancel")

    listed = gateway.client.get("/v1/jobs", params={"status": "cancelled"}).json()["data"]

    assert [job["id"] for job in listed] == [cancelled]


def test_jobs_are_filtered_by_every_given_label(gateway: Gateway) -> None:
    wanted = gateway.create(metadata={"team": "a", "run.no-1": "7"})
    gateway.create(metadata={"team": "a"})
    gateway.create(metadata={"run.no-1": "7"})
    gateway.create()

    listed = gateway.client.get("/v1/jobs?metadata[team]=a&metadata%5Brun.no-1%5D=7").json()["data"]

    assert [job["id"] for job in listed] == [wanted]


@pytest.mark.parametrize(
    ("query", "code", "param"),
    [
        ("limit=0", "invalid_request", "limit"),
        ("limit=101", "invalid_request", "limit"),
        (f"limit={'9' * 5000}", "invalid_request", "limit"),
        ("status=asleep", "invalid_request", "status"),
        ("after=job_%00", "cursor_not_found", "after"),
        ("after=" + "job_" + "0" * 32, "cursor_not_found", "after"),
        ("after=" + "x" * 100, "invalid_request", "after"),
        ("metadata[team]=%00", "invalid_request", "metadata.team"),
        ("metadata[te%00am]=a", "invalid_request", "metadata.te\x00am"),
        ("metadata[]=a", "invalid_request", "metadata."),
        ("metadata[a%22b]=a", "invalid_request", 'metadata.a"b'),
        ("&".join(f"metadata[k{n}]=v" for n in range(17)), "invalid_request", "metadata"),
    ],
)
def test_invalid_query_is_named(refusing: Gateway, query: str, code: str, param: str) -> None:
    body = problem_of(refusing.client.get(f"/v1/jobs?{query}"), 422, code)

    assert body["param"] == param


def test_running_job_shows_progress_and_when_it_may_finish(gateway: Gateway) -> None:
    job_id = gateway.create()
    claim = gateway.claim(job_id, StageName.SCORING)
    before = gateway.client.get(f"/v1/jobs/{job_id}").json()
    gateway.report(claim, 0.5)

    job = gateway.client.get(f"/v1/jobs/{job_id}").json()

    assert (before["status"], before["estimated_finish"]) == ("running", None)
    assert job["stages"][0]["progress"] == 0.5
    assert job["stages"][0]["message"] == "halfway"
    assert job["estimated_finish"] > job["started_at"]


def test_succeeded_job_shows_metrics_and_versions(gateway: Gateway) -> None:
    job_id = gateway.create()
    started = now()
    gateway.run(job_id)

    job = gateway.client.get(f"/v1/jobs/{job_id}").json()

    assert job["status"] == "succeeded"
    assert job["versions"] == {"torch": "2"}
    assert {s["name"]: s["metrics"] for s in job["stages"]} == {
        n: r.model_dump(mode="json") for n, r in RESULTS.items()
    }
    assert job["finished_at"] >= started.isoformat()[:19]
    assert job["estimated_finish"] is None


def test_failed_job_shows_why(gateway: Gateway) -> None:
    job_id = gateway.create()
    gateway.fail(job_id, StageName.SCORING, ErrorInfo(code="model_unsupported", message="No.", param="model.source"))

    job = gateway.client.get(f"/v1/jobs/{job_id}").json()

    assert job["status"] == "failed"
    assert job["error"] == {"code": "model_unsupported", "message": "No.", "param": "model.source"}
    assert job["stages"][0]["error"] == job["error"]


def test_queued_job_is_cancelled_at_once_and_again_without_harm(gateway: Gateway) -> None:
    job_id = gateway.create()

    responses = [gateway.client.post(f"/v1/jobs/{job_id}/cancel") for _ in range(2)]

    assert [response.status_code for response in responses] == [200, 200]
    assert {response.json()["status"] for response in responses} == {"cancelled"}
    assert {stage["status"] for stage in responses[0].json()["stages"]} == {"cancelled"}


def test_running_job_is_cancelling_until_its_worker_stops(gateway: Gateway) -> None:
    job_id = gateway.create()
    gateway.claim(job_id, StageName.SCORING)

    response = gateway.client.post(f"/v1/jobs/{job_id}/cancel")

    assert response.json()["status"] == "cancelling"


def test_finished_job_cannot_be_cancelled(gateway: Gateway) -> None:
    job_id = gateway.create()
    gateway.run(job_id)

    problem_of(gateway.client.post(f"/v1/jobs/{job_id}/cancel"), 409, "job_not_cancellable")


def test_queued_job_is_paused_at_once_and_resumed(gateway: Gateway) -> None:
    job_id = gateway.create()

    paused = [gateway.client.post(f"/v1/jobs/{job_id}/pause") for _ in range(2)]
    resumed = gateway.client.post(f"/v1/jobs/{job_id}/resume")

    assert [(response.status_code, response.json()["status"]) for response in paused] == [(200, "paused")] * 2
    assert paused[0].json()["stages"][0]["status"] == "paused"
    assert (resumed.status_code, resumed.json()["status"]) == (200, "queued")
    assert [stage["status"] for stage in resumed.json()["stages"]] == ["queued"] + ["pending"] * 4
    gateway.run(job_id)


def test_running_job_is_pausing_until_its_worker_stops(gateway: Gateway) -> None:
    job_id = gateway.create()
    gateway.claim(job_id, StageName.SCORING)

    response = gateway.client.post(f"/v1/jobs/{job_id}/pause")

    assert response.json()["status"] == "pausing"
    problem_of(gateway.client.post(f"/v1/jobs/{job_id}/resume"), 409, "job_not_resumable")


def test_failed_job_goes_on_behind_its_finished_stages(gateway: Gateway) -> None:
    job_id = gateway.create()
    gateway.complete(gateway.claim(job_id, StageName.SCORING))
    gateway.fail(job_id, StageName.REMOVAL, ErrorInfo(code="out_of_memory", message="No."))

    job = gateway.client.post(f"/v1/jobs/{job_id}/resume").json()

    assert (job["status"], job["error"], job["finished_at"]) == ("queued", None, None)
    assert [stage["status"] for stage in job["stages"]] == ["succeeded", "queued", "pending", "pending", "pending"]
    assert all(stage["error"] is None for stage in job["stages"])
    for stage in list(StageName)[1:]:
        gateway.complete(gateway.claim(job_id, stage))
    assert gateway.client.get(f"/v1/jobs/{job_id}").json()["status"] == "succeeded"


def test_what_a_state_forbids_is_refused_with_what_it_allows(gateway: Gateway) -> None:
    running = gateway.create()
    finished = gateway.create()
    gateway.run(finished)

    resumed = problem_of(gateway.client.post(f"/v1/jobs/{running}/resume"), 409, "job_not_resumable")
    paused = problem_of(gateway.client.post(f"/v1/jobs/{finished}/pause"), 409, "job_not_pausable")

    assert resumed["detail"].endswith("is queued: resume is not possible. Possible now: pause, cancel.")
    assert paused["detail"].endswith("is succeeded: pause is not possible. Possible now: delete.")


def test_deleted_job_is_gone_from_every_route_at_once(gateway: Gateway) -> None:
    kept, job_id = gateway.create(), gateway.create()
    gateway.store(job_id, StageName.SCORING, {"scores.json": b"{}"})
    (artifact,) = gateway.client.get(f"/v1/jobs/{job_id}/artifacts").json()["data"]
    gateway.client.post(f"/v1/jobs/{job_id}/cancel")

    deleted = gateway.client.delete(f"/v1/jobs/{job_id}")

    assert (deleted.status_code, deleted.content) == (204, b"")
    content = f"/artifacts/{artifact['id']}/content"
    for path in ("", "/events", "/artifacts", content):
        problem_of(gateway.client.get(f"/v1/jobs/{job_id}{path}"), 404, "job_not_found")
    for action in ("cancel", "pause", "resume"):
        problem_of(gateway.client.post(f"/v1/jobs/{job_id}/{action}"), 404, "job_not_found")
    problem_of(gateway.client.delete(f"/v1/jobs/{job_id}"), 404, "job_not_found")
    problem_of(gateway.client.get(f"/v1/jobs?after={job_id}"), 422, "cursor_not_found")
    assert [job["id"] for job in gateway.client.get("/v1/jobs").json()["data"]] == [kept]


def test_files_and_rows_of_a_deleted_job_go_and_those_of_another_stay(gateway: Gateway) -> None:
    kept, job_id = gateway.create(), gateway.create()
    store = gateway.app.state.store
    for created in (kept, job_id):
        gateway.store(created, StageName.SCORING, {"scores.json": b"{}", "deep/windows": b"x"})
    store.put_bytes(f"jobs/{job_id}/removal/state/evaluated.json", b"{}")
    gateway.client.post(f"/v1/jobs/{job_id}/pause")
    gateway.client.delete(f"/v1/jobs/{job_id}")
    at_once = gateway.settings.model_copy(update={"lease_seconds": 0.0})

    assert purge(gateway.database, at_once, store) == 1

    assert list(store.list_keys(f"jobs/{job_id}")) == []
    assert len(list(store.list_keys(f"jobs/{kept}"))) == 2
    with transaction(gateway.database) as session:
        for table in (JobRow.id, StageRow.job_id, EventRow.job_id, ArtifactRow.job_id):
            assert set(session.exec(select(table)).all()) == {kept}
    assert purge(gateway.database, at_once, store) == 0


def test_unfinished_job_cannot_be_deleted(gateway: Gateway) -> None:
    queued, running = gateway.create(), gateway.create()
    gateway.claim(running, StageName.SCORING)

    for job_id in (queued, running):
        body = problem_of(gateway.client.delete(f"/v1/jobs/{job_id}"), 409, "job_not_deletable")
        assert body["detail"].endswith("delete is not possible. Possible now: pause, cancel.")


def test_key_of_a_deleted_job_makes_a_new_one(gateway: Gateway) -> None:
    headers = {"Idempotency-Key": "one"}
    first = gateway.client.post("/v1/jobs", json=dict(gateway.spec), headers=headers).json()["id"]
    gateway.client.post(f"/v1/jobs/{first}/cancel")
    gateway.client.delete(f"/v1/jobs/{first}")

    second = gateway.client.post("/v1/jobs", json=dict(gateway.spec), headers=headers)

    assert second.status_code == 201
    assert second.json()["id"] != first
