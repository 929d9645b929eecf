from __future__ import annotations

import pytest

from pdtrim.contract.jobs import StageName
from tests.gateway import Gateway, problem_of


def test_events_are_paged_by_their_numbers(gateway: Gateway) -> None:
    job_id = gateway.create()
    claim = gateway.claim(job_id, StageName.SCORING)
    gateway.report(claim, 0.5)
    gateway.complete(claim)
    path = f"/v1/jobs/{job_id}/events"

    first = gateway.client.get(path, params={"limit": 3}).json()
    second = gateway.client.get(path, params={"limit": 3, "after": first["last_id"]}).json()

    assert [event["number"] for event in first["data"] + second["data"]] == [1, 2, 3, 4]
    assert [event["type"] for event in first["data"]] == ["job.created", "stage.started", "stage.progress"]
    assert first["data"][2]["data"] == {"progress": 0.5, "loss": 1.5}
    assert first["data"][2]["stage"] == "scoring"
    assert (first["has_more"], second["has_more"]) == (True, False)
    assert (first["first_id"], first["last_id"]) == ("1", "3")


def test_a_page_past_the_last_event_is_empty(gateway: Gateway) -> None:
    page = gateway.client.get(f"/v1/jobs/{gateway.create()}/events", params={"after": 2**31 - 1}).json()

    assert page == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


@pytest.mark.parametrize(
    "query", ["after=-1", f"after={2**31}", f"after={'9' * 5000}", "after=x", "limit=0", "limit=101"]
)
def test_invalid_number_is_named(gateway: Gateway, query: str) -> None:
    body = problem_of(gateway.client.get(f"/v1/jobs/{gateway.create()}/events?{query}"), 422, "invalid_request")

    assert body["param"] == query.partition("=")[0]


def test_invalid_last_event_id_is_named(gateway: Gateway) -> None:
    headers = {"accept": "text/event-stream", "last-event-id": "latest"}

    body = problem_of(
        gateway.client.get(f"/v1/jobs/{gateway.create()}/events", headers=headers), 422, "invalid_request"
    )

    assert body["param"] == "Last-Event-ID"


def test_a_stream_of_an_unknown_job_is_a_problem(gateway: Gateway) -> None:
    response = gateway.client.get(f"/v1/jobs/job_{'0' * 32}/events", headers={"accept": "text/event-stream"})

    problem_of(response, 404, "job_not_found")
