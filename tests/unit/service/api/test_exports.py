from __future__ import annotations

from typing import Any

import pytest

from pdtrim.contract.frontier import Frontier
from pdtrim.contract.jobs import JobStatus, StageName
from pdtrim.contract.results import DistillationResult, Healing
from service.db import devices
from service.db.session import transaction
from tests.found import plan
from tests.gateway import Gateway, problem_of
from tests.unit.service.checking.test_placement import gpus

REFERENCE = {"model": "reference", "prefill": {"remove_blocks": 2}, "decode": {"remove_blocks": 4}}


@pytest.fixture
def searched(gateway: Gateway) -> str:
    """A job whose search has ended; nothing else has."""
    job_id = gateway.create(metadata={"team": "serving"}, priority="high")
    gateway.store(job_id, StageName.SCORING, {})
    gateway.store(job_id, StageName.REMOVAL, {"plan.json": plan().model_dump_json().encode()})
    return job_id


def export(gateway: Gateway, job_id: str, prefill: int, decode: int, **request: Any) -> Any:
    body = {"prefill": {"remove_blocks": prefill}, "decode": {"remove_blocks": decode}}
    return gateway.client.post(f"/v1/jobs/{job_id}/exports", json=body, **request)


def test_the_frontier_has_the_best_set_of_every_count(gateway: Gateway, searched: str) -> None:
    frontier = Frontier.model_validate(gateway.client.get(f"/v1/jobs/{searched}/frontier").json())

    assert (frontier.job_id, frontier.objective) == (searched, "kl")
    assert [(point.remove_blocks, point.removed) for point in frontier.decode] == [
        (2, [1, 4]),
        (3, [1, 3, 4]),
        (4, [1, 2, 3, 4]),
    ]
    assert frontier.unified == frontier.prefill
    assert [point.perplexity_increase for point in frontier.prefill] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert frontier.chosen.prefill.removed == [1, 4]
    assert frontier.chosen.prefill.distilled == {4: 3}


def test_an_export_is_a_job_of_other_counts_cut_from_it(gateway: Gateway, searched: str) -> None:
    made = export(gateway, searched, 2, 3)

    assert made.status_code == 201, made.text
    job = gateway.client.get(made.headers["Location"]).json()
    assert (job["cut_from"], job["status"]) == (searched, JobStatus.QUEUED)
    assert [job["spec"][half]["remove_blocks"] for half in ("prefill", "decode")] == [2, 3]
    assert (job["metadata"], job["spec"]["priority"]) == ({"team": "serving"}, "high")
    assert gateway.client.get(f"/v1/jobs/{searched}").json()["cut_from"] is None
    assert export(gateway, searched, 3, 3).status_code == 201


def test_what_is_not_on_the_frontier_is_refused(gateway: Gateway, searched: str) -> None:
    for prefill, decode, code, param, said in (
        (2, 5, "no_such_point", "decode.remove_blocks", "has 2, 3, 4"),
        (4, 4, "no_such_point", "prefill.remove_blocks", "has 0, 1, 2, 3"),
        (3, 2, "invalid_request", "prefill.remove_blocks", "KV cache"),
    ):
        problem = problem_of(export(gateway, searched, prefill, decode), 422, code)
        assert (problem["param"], said in problem["detail"]) == (param, True)
    for prefill, decode in ((1, 3), (1, 1), (0, 0)):
        assert export(gateway, searched, prefill, decode).status_code == 201


def test_sets_that_are_not_nested_are_refused(gateway: Gateway) -> None:
    found = plan()
    found.frontier.decode[1].removed[:] = [3, 4, 5]
    job_id = gateway.create()
    gateway.store(job_id, StageName.SCORING, {})
    gateway.store(job_id, StageName.REMOVAL, {"plan.json": found.model_dump_json().encode()})

    problem = problem_of(export(gateway, job_id, 1, 3), 422, "sets_not_nested")

    assert "keeps block 1" in problem["detail"]


def test_a_job_without_a_frontier_and_a_deleted_one_are_told_apart(gateway: Gateway, searched: str) -> None:
    waiting = gateway.create()
    gateway.client.post(f"/v1/jobs/{searched}/cancel")
    assert gateway.client.delete(f"/v1/jobs/{searched}").status_code == 204

    for answer in (gateway.client.get(f"/v1/jobs/{waiting}/frontier"), export(gateway, waiting, 1, 2)):
        assert "removal, which searches it, is pending" in problem_of(answer, 409, "no_frontier")["detail"]
    problem_of(export(gateway, searched, 1, 2), 404, "job_not_found")


def test_an_export_that_is_sent_again_makes_one_job(gateway: Gateway, searched: str) -> None:
    key = {"Idempotency-Key": "one"}

    first, again = (export(gateway, searched, 2, 3, headers=key) for _ in range(2))
    other = export(gateway, searched, 2, 4, headers=key)

    assert first.json() == again.json()
    assert again.headers["Idempotency-Replayed"] == "true"
    problem_of(other, 422, "idempotency_key_reused")


def test_an_estimate_says_what_a_job_would_make_and_queues_nothing(gateway: Gateway) -> None:
    found = gateway.client.post("/v1/jobs/estimate", json=REFERENCE).json()

    assert gateway.client.get("/v1/jobs").json()["data"] == []
    assert [(one["role"], one["blocks"]) for one in found["checkpoints"]] == [("prefill", 10), ("decode", 8)]
    # The reference model has 4096 embeddings of 192 numbers and blocks of 393,600, as its own parameters count.
    assert found["dense"]["parameters"] == 5_509_824
    assert found["checkpoints"][1]["bytes"] == 2 * (5_509_824 - 4 * 393_600)
    assert found["dense"]["kv_bytes_per_token"] == 12 * 2 * 2 * 32 * 2
    # Greedy from none to two of twelve, then annealing's own: there are fewer pairs than its budget.
    assert found["evaluations"]["prefill"] == 1 + 12 + 66
    assert found["earlier"] is None
    assert [warning["param"] for warning in found["warnings"]] == ["prefill.remove_blocks"]


@pytest.mark.parametrize("healed", [True, False])
def test_an_estimate_knows_what_an_earlier_job_took_for_work_that_this_one_has_too(
    gateway: Gateway, healed: bool
) -> None:
    done, _ = gateway.create(model="reference"), gateway.create()
    healing = Healing(before=1.0, after=0.9, steps=4, kept="distilled") if healed else None
    for stage in StageName:
        result = DistillationResult(enabled=healed, prefill=healing) if stage == StageName.DISTILLATION else None
        gateway.complete(gateway.claim(done, stage), result=result)

    def earlier(**changes: Any) -> Any:
        return gateway.client.post("/v1/jobs/estimate", json={**REFERENCE, **changes}).json()["earlier"]

    assert earlier()["job_id"] == done
    assert set(earlier(distillation={"enabled": False})["seconds"]) == set(StageName)
    assert set(earlier()["seconds"]) == set(StageName) - ({StageName.DISTILLATION} if not healed else set())


def test_a_job_that_no_worker_has_room_for_is_refused_with_the_number_and_estimated_all_the_same(
    gateway: Gateway,
) -> None:
    tiny = gpus("default", 1).model_copy(update={"memory_bytes": 700_500_000})
    with transaction(gateway.database) as session:
        devices.saw(session, tiny)

    problem = problem_of(gateway.client.post("/v1/jobs", json=REFERENCE), 422, "too_little_memory")

    assert "of a device's memory, and the workers of the queue default have 0.7 GB (a GPU of 1 GB)" in problem["detail"]
    found = gateway.client.post("/v1/jobs/estimate", json=REFERENCE).json()
    assert found["warnings"][0]["message"].startswith("It will be refused: Its ")
    assert not all(stage["fits"] for stage in found["stages"])


def test_a_job_that_names_no_queue_goes_where_there_is_room(gateway: Gateway) -> None:
    gateway.settings.queues.append("large")
    tiny = gpus("default", 1).model_copy(update={"memory_bytes": 700_500_000})
    with transaction(gateway.database) as session:
        devices.saw(session, tiny)
        devices.saw(session, gpus("large", 80))

    assert gateway.client.post("/v1/jobs", json=REFERENCE).json()["queue"] == "large"


def test_an_estimate_refuses_what_a_submission_does_and_takes_post_alone(gateway: Gateway) -> None:
    spec = {**gateway.spec, "prefill": {"remove_blocks": 9}, "decode": {"remove_blocks": 9}}

    refusals = [gateway.client.post(path, json=spec).json() for path in ("/v1/jobs", "/v1/jobs/estimate")]

    assert {(one["code"], one["param"], one["detail"]) for one in refusals} == {
        ("too_many_blocks", "prefill.remove_blocks", refusals[0]["detail"])
    }
    wrong = gateway.client.get("/v1/jobs/estimate")
    problem_of(wrong, 405, "method_not_allowed")
    assert wrong.headers["Allow"] == "POST"
