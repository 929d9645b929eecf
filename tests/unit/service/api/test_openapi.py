from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from pdtrim.contract.estimate import Estimate
from pdtrim.contract.frontier import ExportSpec, Frontier
from pdtrim.contract.jobs import Artifact, Event, Job, Page, StageName
from pdtrim.contract.publications import Publication
from pdtrim.contract.spec import JobSpec
from pdtrim.contract.webhooks import Delivery, NewSecret, Webhook, WebhookChange, WebhookSpec
from service.api import examples
from service.api.health import Readiness
from service.upkeep.outbound import Policy, check_url
from tests.gateway import Gateway


@pytest.fixture
def document(gateway: Gateway) -> dict[str, Any]:
    found: dict[str, Any] = gateway.client.get("/openapi.json").json()
    return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for operation in methods.values():
            yield path, operation


def test_operations_have_readable_ids_tags_and_summaries(document: dict[str, Any]) -> None:
    assert {operation["operationId"] for _, operation in operations(document)} == {
        "create_job",
        "estimate_job",
        "list_jobs",
        "get_job",
        "cancel_job",
        "pause_job",
        "resume_job",
        "delete_job",
        "list_events",
        "list_artifacts",
        "get_artifact_content",
        "head_artifact_content",
        "get_frontier",
        "create_export",
        "get_manifests",
        "list_publications",
        "publish_job",
        "create_webhook",
        "list_webhooks",
        "get_webhook",
        "update_webhook",
        "delete_webhook",
        "rotate_webhook_secret",
        "test_webhook",
        "list_deliveries",
        "resend_delivery",
        "list_methods",
        "healthz",
        "readyz",
        "metrics",
    }
    assert all(operation["tags"] and operation["summary"] for _, operation in operations(document))


def test_every_error_is_documented_as_a_problem(document: dict[str, Any]) -> None:
    for path, operation in operations(document):
        failures = {code: response for code, response in operation["responses"].items() if code >= "400"}
        if path.startswith("/v1"):
            assert {"401", "403", "429", "500", "503"} <= failures.keys(), path
            assert "rate_limited" in failures["429"]["content"]["application/problem+json"]["examples"], path
            assert {"Retry-After", "RateLimit", "RateLimit-Policy"} <= failures["429"]["headers"].keys(), path
            assert operation["security"] == [{"ApiKey": []}]
        if "{job_id}" in path or "{webhook_id}" in path:
            assert "404" in failures, path
        for response in failures.values():
            content = response["content"]["application/problem+json"]
            assert content["schema"] == {"$ref": "#/components/schemas/Problem"}
            assert all(example["value"]["code"] == code for code, example in content["examples"].items())


def test_what_a_quota_refuses_is_documented(document: dict[str, Any]) -> None:
    for path in ("/v1/jobs", "/v1/jobs/{job_id}/resume", "/v1/jobs/{job_id}/exports"):
        refused = document["paths"][path]["post"]["responses"]["429"]["content"]["application/problem+json"]
        assert set(refused["examples"]) == {"rate_limited", "queue_quota_exceeded", "artifact_quota_exceeded"}


def test_the_document_refers_only_to_schemas_it_has(document: dict[str, Any]) -> None:
    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from (value for key, value in node.items() if key == "$ref")
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    schemas = document["components"]["schemas"]
    assert {name.rpartition("/")[2] for name in references(document["paths"])} <= schemas.keys()
    assert "HTTPValidationError" not in schemas
    assert document["components"]["securitySchemes"]["ApiKey"]["scheme"] == "bearer"


@pytest.mark.slow
def test_labels_are_no_empty_objects_to_generators_of_clients(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    found = [schemas[name]["properties"]["metadata"] for name in ("JobSpec-Input", "JobSpec-Output")]
    found.append(schemas["ExportSpec"]["properties"]["metadata"]["anyOf"][0])
    for labels in found:
        assert labels["additionalProperties"]["type"] == "string"
        assert "propertyNames" in labels


@pytest.mark.parametrize("request_", examples.REQUESTS.values(), ids=examples.REQUESTS.keys())
def test_request_examples_are_valid(request_: dict[str, Any]) -> None:
    JobSpec.model_validate(request_["value"])


def test_export_examples_are_valid() -> None:
    Job.model_validate(examples.CUT_JOB)
    for request in examples.EXPORT_REQUESTS.values():
        ExportSpec.model_validate(request["value"])


def test_webhook_examples_are_valid() -> None:
    for request in examples.WEBHOOK_REQUESTS.values():
        check_url(WebhookSpec.model_validate(request["value"]).url, Policy())
    for request in examples.WEBHOOK_CHANGES.values():
        WebhookChange.model_validate(request["value"])


def test_the_message_that_webhooks_are_sent_is_described(document: dict[str, Any]) -> None:
    (called,) = document["paths"]["/v1/webhooks"]["post"]["callbacks"]["receive_message"].values()

    assert called["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/WebhookMessage")


def test_response_examples_are_what_the_models_give() -> None:
    for model, example in (
        (Page[Job], examples.JOBS),
        (Page[Event], examples.EVENTS),
        (Page[Artifact], examples.ARTIFACTS),
        (Frontier, examples.FRONTIER),
        (Estimate, examples.ESTIMATE),
        (Page[Publication], examples.PUBLICATIONS),
        (NewSecret, examples.NEW_SECRET),
        (Page[Webhook], examples.WEBHOOKS),
        (Page[Delivery], examples.DELIVERIES),
        (Readiness, examples.READY),
    ):
        shown = model.model_validate(example).model_dump(mode="json", exclude={"data": {"__all__": {"spec"}}})
        given = {**example}
        if "data" in given:
            given["data"] = [{key: value for key, value in one.items() if key != "spec"} for one in given["data"]]
        assert shown == given


def test_a_client_can_be_generated_that_has_a_type_for_the_result_of_each_stage(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    titles = [schema["title"] for schema in schemas.values()]
    assert len(set(titles)) == len(titles)
    stages = schemas["Job"]["properties"]["stages"]["items"]
    named = {name: ref.rpartition("/")[2] for name, ref in stages["discriminator"]["mapping"].items()}
    assert set(named) == set(StageName)
    for name, stage in named.items():
        assert schemas[stage]["properties"]["name"]["const"] == name
        result, nothing = schemas[stage]["properties"]["metrics"]["anyOf"]
        assert nothing == {"type": "null"}
        found = schemas[result["$ref"].rpartition("/")[2]]
        assert set(found["required"]) == set(found["properties"])


def test_documentation_page_is_there(gateway: Gateway) -> None:
    assert "/openapi.json" in gateway.client.get("/docs").text


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_the_pages_of_the_interface_load_nothing_from_elsewhere(gateway: Gateway, path: str) -> None:
    page = gateway.client.get(path).text
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page)

    assert len(loaded) >= 2
    assert all(gateway.client.get(one).status_code == 200 for one in loaded)
    assert "//" not in "".join(loaded)


def test_the_root_leads_to_the_dashboard(gateway: Gateway) -> None:
    answer = gateway.client.get("/", follow_redirects=False)

    assert (answer.status_code, answer.headers["location"]) == (307, "/ui")


def test_methods_come_with_a_schema_that_names_every_parameter(gateway: Gateway) -> None:
    page = gateway.client.get("/v1/methods").json()

    method = page["data"][0]
    assert (page["first_id"], page["last_id"], page["has_more"]) == ("pdtrim", "pdtrim", False)
    assert method["paper"].endswith("2509.04467")
    assert method["parameters"] == JobSpec.model_json_schema()
