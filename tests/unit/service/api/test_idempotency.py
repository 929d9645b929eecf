from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from sqlalchemy import text

from pdtrim.contract.access import DEFAULT_PROJECT
from pdtrim.contract.spec import JobSpec
from service.api.idempotency import fingerprint
from service.db import idempotency
from service.db.session import transaction
from tests.gateway import Gateway, listening, problem_of

KEY = {"Idempotency-Key": '"8e03978e-40d5-43dd-bc93-6894a57f9324"'}


def number_of_jobs(gateway: Gateway) -> int:
    return len(gateway.client.get("/v1/jobs").json()["data"])


def test_the_same_request_again_gets_the_same_answer_and_makes_no_job(gateway: Gateway) -> None:
    first = gateway.client.post("/v1/jobs", json=dict(gateway.spec), headers=KEY)
    gateway.run(first.json()["id"])

    again = gateway.client.post("/v1/jobs", json=dict(reversed(list(gateway.spec.items()))), headers=KEY)

    assert (first.status_code, again.status_code) == (201, 201)
    assert again.content == first.content
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["idempotency-replayed"] == "true"
    assert "idempotency-replayed" not in first.headers
    assert number_of_jobs(gateway) == 1


def test_a_key_means_the_same_bare_and_quoted(gateway: Gateway) -> None:
    bare = {"Idempotency-Key": KEY["Idempotency-Key"].strip('"')}

    first, again = (gateway.client.post("/v1/jobs", json=dict(gateway.spec), headers=key) for key in (KEY, bare))

    assert first.json()["id"] == again.json()["id"]


def test_another_body_is_refused(gateway: Gateway) -> None:
    gateway.client.post("/v1/jobs", json=dict(gateway.spec), headers=KEY)

    refused = gateway.client.post("/v1/jobs", json={**gateway.spec, "seed": 1}, headers=KEY)

    assert problem_of(refused, 422, "idempotency_key_reused")["param"] == "Idempotency-Key"
    assert number_of_jobs(gateway) == 1


def test_a_request_that_is_not_answered_yet_holds_its_key(gateway: Gateway) -> None:
    said = fingerprint(JobSpec.model_validate(gateway.spec))
    with transaction(gateway.database) as session:
        idempotency.claim(session, DEFAULT_PROJECT, KEY["Idempotency-Key"].strip('"'), said)

    refused = gateway.client.post("/v1/jobs", json=dict(gateway.spec), headers=KEY)

    problem_of(refused, 409, "request_in_flight")
    assert refused.headers["retry-after"] == "1"
    assert number_of_jobs(gateway) == 0


def test_the_key_of_a_gateway_that_died_is_free_after_a_while(gateway: Gateway) -> None:
    with transaction(gateway.database) as session:
        dead = idempotency.claim(session, DEFAULT_PROJECT, KEY["Idempotency-Key"].strip('"'), "0" * 64)
    with gateway.database.begin() as connection:
        connection.execute(text("UPDATE idempotency_keys SET reserved_at = '2020-01-01'"))

    assert gateway.client.post("/v1/jobs", json=dict(gateway.spec), headers=KEY).status_code == 201
    assert isinstance(dead, idempotency.KeyClaim)


def test_a_refused_request_frees_its_key(gateway: Gateway) -> None:
    wrong = gateway.client.post("/v1/jobs", json={**gateway.spec, "model": "file:///etc"}, headers=KEY)

    problem_of(wrong, 422, "source_not_allowed")
    assert gateway.client.post("/v1/jobs", json=dict(gateway.spec), headers=KEY).status_code == 201


@pytest.mark.parametrize("key", ["", '""', '"', '"a', "a b", "a,b", "é", "a" * 129, '"' + "a" * 129 + '"'])
def test_what_cannot_be_a_key_is_refused(refusing: Gateway, key: str) -> None:
    headers = {b"idempotency-key": key.encode()}

    refused = refusing.client.post("/v1/jobs", json=dict(refusing.spec), headers=headers)

    assert problem_of(refused, 400, "invalid_idempotency_key")["param"] == "Idempotency-Key"


def test_two_keys_at_once_are_refused(refusing: Gateway) -> None:
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]

    refused = refusing.client.post("/v1/jobs", json=dict(refusing.spec), headers=headers)

    problem_of(refused, 400, "invalid_idempotency_key")


def test_requests_at_once_on_two_gateways_make_one_job(gateway: Gateway) -> None:
    def create(url: str) -> httpx.Response:
        return httpx.post(f"{url}/v1/jobs", json=dict(gateway.spec), headers=KEY, timeout=60, trust_env=False)

    with listening(gateway.settings) as one, listening(gateway.settings) as two, ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(create, [one, two] * 4))

    created = [answer for answer in answers if answer.status_code == 201]
    assert {answer.status_code for answer in answers} <= {201, 409}
    assert sum("idempotency-replayed" not in answer.headers for answer in created) == 1
    assert len({answer.content for answer in created}) == 1
    assert number_of_jobs(gateway) == 1
