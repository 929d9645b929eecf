"""What a client is told that wrote a name which nothing has."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.gateway import Gateway, problem_of


@pytest.mark.parametrize(
    ("query", "param", "said"),
    [
        ("name=x", "name", "name: is no parameter of this path; it has after, limit, metadata, status"),
        ("limt=5", "limt", "limt: is no parameter of this path; did you mean limit?"),
        ("metadata=team", "metadata", "metadata: is given by key, as metadata[team]=serving"),
        ("Status=failed", "Status", "Status: is no parameter of this path; did you mean status?"),
    ],
)
def test_a_parameter_that_there_is_not_is_refused(refusing: Gateway, query: str, param: str, said: str) -> None:
    problem = problem_of(refusing.client.get(f"/v1/jobs?{query}"), 422, "invalid_request")

    assert (problem["param"], problem["detail"]) == (param, said)


@pytest.mark.parametrize("path", ["/v1/methods?x=1", "/v1/jobs/job_1/frontier?x=1", "/v1/webhooks?status=failed"])
def test_no_path_takes_parameters_that_it_does_not_read(refusing: Gateway, path: str) -> None:
    assert refusing.client.get(path).status_code in (404, 422)
    assert "is no parameter of this path" in refusing.client.get(path).text or "job_1" in path


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        ({"distilation": {}}, "distilation", "did you mean distillation?"),
        ({"prefill": {"remove_block": 1}}, "prefill.remove_block", "did you mean remove_blocks?"),
        ({"distillation": {"losses": {"KL": 1}}}, "distillation.losses.KL", "did you mean kl?"),
        ({"model": {"source": "reference", "revison": "main"}}, "model.revison", "did you mean revision?"),
        ({"zzz": 1}, "zzz", "there is no such field"),
    ],
)
def test_a_field_that_there_is_not_is_told_with_the_one_that_was_meant(
    refusing: Gateway, changes: dict[str, Any], param: str, said: str
) -> None:
    problem = problem_of(refusing.client.post("/v1/jobs", json={**refusing.spec, **changes}), 422, "invalid_request")

    assert problem["param"] == param
    assert said in problem["detail"]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("Qwen/Qwen3-8B", "Did you mean hf://Qwen/Qwen3-8B?"),
        ("https://huggingface.co/Qwen/Qwen3-8B", "Did you mean hf://Qwen/Qwen3-8B?"),
        ("/srv/my models/one", "Did you mean file:///srv/my%20models/one?"),
        ("./model", "A path on this machine is given whole, as file:///home/me/model."),
    ],
)
def test_a_source_without_its_scheme_is_told_with_it(refusing: Gateway, model: str, said: str) -> None:
    refused = refusing.client.post("/v1/jobs", json={**refusing.spec, "model": model})

    assert said in problem_of(refused, 422, "invalid_request")["detail"]


def test_many_and_long_unknown_names_take_no_time(refusing: Gateway) -> None:
    many = {f"field{number}" * 6: 1 for number in range(2000)} | {"x" * 100_000: 1}
    started = time.process_time()
    refused = refusing.client.post("/v1/jobs", json={**refusing.spec, **many})

    assert "and 1996 more errors" in problem_of(refused, 422, "invalid_request")["detail"]
    assert time.process_time() - started < 1
