"""A gateway that takes tokens of a real OpenID provider, beside keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdtrim.contract.access import Scope
from service.api import oidc
from service.db import keys
from service.db.session import transaction
from service.settings import Settings
from tests.gateway import Gateway, problem_of, serve
from tests.issuer import AUDIENCE, Issuer, ec_key, issuer
from tests.servers import free_ports


@pytest.fixture
def running() -> Iterator[Issuer]:
    with issuer() as found:
        yield found


@pytest.fixture
def gateway(gateway_settings: Settings, model: Path, running: Issuer) -> Iterator[Gateway]:
    changes = {"oidc_issuer": running.url, "oidc_audience": AUDIENCE}
    with serve(gateway_settings.model_copy(update=changes), model) as found:
        yield found


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def ask(gateway: Gateway, token: str, method: str = "GET", path: str = "/v1/jobs") -> Any:
    body = dict(gateway.spec) if method == "POST" else None
    return gateway.client.request(method, path, headers=bearer(token), json=body)


def test_a_token_opens_its_project_with_its_scopes(gateway: Gateway, running: Issuer) -> None:
    created = ask(gateway, running.token(), "POST").json()["id"]

    assert [job["id"] for job in ask(gateway, running.token(sub="another")).json()["data"]] == [created]
    assert ask(gateway, running.token(project="theirs")).json()["data"] == []
    problem_of(ask(gateway, running.token(project="theirs"), path=f"/v1/jobs/{created}"), 404, "job_not_found")
    reading = running.token(scope="pdtrim:read")
    assert ask(gateway, reading).status_code == 200
    assert "`read`" in problem_of(ask(gateway, reading, "POST"), 403, "missing_scope")["detail"]
    assert "none" in problem_of(ask(gateway, running.token(scope="openid")), 403, "missing_scope")["detail"]
    assert ask(gateway, running.token(scope="pdtrim:admin"), "POST").status_code == 201


@pytest.mark.parametrize("project", [None, "", "No Such", 7, ["ours"]])
def test_a_token_has_to_name_a_project(gateway: Gateway, running: Issuer, project: object) -> None:
    refused = ask(gateway, running.token(project=project))

    assert "`project`" in problem_of(refused, 403, "missing_project")["detail"]


def test_what_does_not_open_is_refused_without_telling_why(gateway: Gateway, running: Issuer) -> None:
    answers = [
        ask(gateway, token)
        for token in (running.token(exp=1), running.token(aud="x"), running.token(key=ec_key("first")), "ey.e.e", "")
    ]

    assert all(problem_of(answer, 401, "unauthorized") for answer in answers)
    assert len({answer.json()["detail"] for answer in answers}) == 1


def test_keys_open_beside_tokens_and_nothing_is_open_without_either(gateway: Gateway) -> None:
    with transaction(gateway.database) as session:
        key = keys.create(session, project="ours", name="ci", scopes={Scope.READ})[1]

    assert ask(gateway, key).status_code == 200
    problem_of(gateway.client.get("/v1/jobs"), 401, "unauthorized")


def test_an_issuer_alone_closes_the_gateway(gateway: Gateway, running: Issuer) -> None:
    problem_of(gateway.client.get("/v1/jobs"), 401, "unauthorized")
    assert ask(gateway, running.token()).status_code == 200


def test_a_subject_is_counted_alone(gateway_settings: Settings, model: Path, running: Issuer) -> None:
    changes = {"oidc_issuer": running.url, "oidc_audience": AUDIENCE, "rate_limit": "2/hour"}
    with serve(gateway_settings.model_copy(update=changes), model) as gateway:
        mine = [ask(gateway, running.token(jti=str(number))).status_code for number in range(3)]
        theirs = ask(gateway, running.token(sub="another"))

    assert mine == [200, 200, 429]
    assert (theirs.status_code, theirs.headers["ratelimit"][:14]) == (200, '"subject";r=1;')


def test_guessing_tokens_is_limited_by_address(gateway_settings: Settings, model: Path, running: Issuer) -> None:
    changes = {"oidc_issuer": running.url, "oidc_audience": AUDIENCE, "failed_auth_limit": "2/hour"}
    with serve(gateway_settings.model_copy(update=changes), model) as gateway:
        stolen = [ask(gateway, running.token(exp=number)).status_code for number in range(1, 5)]

    assert stolen == [401, 401, 429, 429]


def test_other_claims_and_words_may_be_configured(gateway_settings: Settings, model: Path, running: Issuer) -> None:
    changes = {
        "oidc_issuer": running.url,
        "oidc_audience": AUDIENCE,
        "oidc_project_claim": "team.name",
        "oidc_scopes_claim": "resource_access.pdtrim.roles",
        "oidc_scopes": {"ml-engineer": Scope.SUBMIT, "viewer": Scope.READ},
    }
    token = running.token(
        project="ours", team={"name": "serving"}, resource_access={"pdtrim": {"roles": ["viewer", "ml-engineer"]}}
    )
    with serve(gateway_settings.model_copy(update=changes), model) as gateway:
        assert ask(gateway, token, "POST").status_code == 201
        assert len(ask(gateway, token).json()["data"]) == 1
        problem_of(ask(gateway, running.token(team={"name": "serving"})), 403, "missing_scope")


def test_a_provider_that_is_away_is_a_problem_and_keys_go_on(
    gateway_settings: Settings, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = free_ports(1)
    changes = {"oidc_issuer": f"http://127.0.0.1:{port}", "oidc_audience": AUDIENCE}
    with serve(gateway_settings.model_copy(update=changes), model) as gateway:
        with issuer(port) as running:
            known, unknown = running.token(), running.token(key=ec_key("new"))
            assert ask(gateway, known).status_code == 200
        monkeypatch.setattr(oidc, "PAUSE_S", 0.0)
        away = ask(gateway, unknown)
        with transaction(gateway.database) as session:
            key = keys.create(session, project="ours", name="ci", scopes={Scope.READ})[1]

        assert ask(gateway, known).status_code == 200
        assert ask(gateway, key).status_code == 200
    assert "OpenID provider" in problem_of(away, 503, "dependency_unavailable")["detail"]
    assert int(away.headers["retry-after"]) >= 0
