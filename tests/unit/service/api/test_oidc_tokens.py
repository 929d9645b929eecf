"""Tokens of a real provider on this machine: which open, and what happens while its keys change or it is away."""

from __future__ import annotations

import base64
import hmac
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Event
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import OctKey, OKPKey

from service.api import oidc
from service.api.oidc import InvalidToken, Provider, ProviderAway
from tests.issuer import AUDIENCE, DISCOVERY, Issuer, ec_key, issuer, rsa_key
from tests.servers import free_ports


@pytest.fixture
def running() -> Iterator[Issuer]:
    with issuer() as found:
        yield found


@pytest.fixture
def provider(running: Issuer) -> Provider:
    return Provider(running.url, AUDIENCE)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider may be asked again at once."""
    monkeypatch.setattr(oidc, "PAUSE_S", 0.0)


def segment(content: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()


def test_a_token_opens_and_its_keys_are_read_once(running: Issuer, provider: Provider) -> None:
    for _ in range(5):
        assert provider.verify(running.token())["sub"] == "someone"

    assert running.asked == [DISCOVERY, "/keys"]


@pytest.mark.parametrize("key", [rsa_key("r"), ec_key("e"), OKPKey.generate_key("Ed25519", {"kid": "o"})])
def test_keys_of_every_common_kind_sign(running: Issuer, provider: Provider, key: Any) -> None:
    running.keys = [key, ec_key("another")]
    alg = {"RSA": "PS256", "EC": "ES256", "OKP": "Ed25519"}[key.key_type]

    assert provider.verify(running.token(alg=alg))["project"] == "ours"


def test_a_token_for_several_audiences_opens(running: Issuer, provider: Provider) -> None:
    assert provider.verify(running.token(aud=["other", AUDIENCE]))["sub"] == "someone"


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": int(time.time()) - 3600},
        {"exp": None},
        {"exp": "tomorrow"},
        {"nbf": int(time.time()) + 3600},
        {"iat": int(time.time()) + 3600},
        {"aud": "another"},
        {"aud": None},
        {"aud": ["another", "a-third"]},
        {"iss": "http://127.0.0.1:1"},
        {"iss": None},
        {"sub": None},
    ],
    # By number: processes that collect the tests at different seconds have to agree on their names.
)
def test_a_token_with_wrong_claims_does_not_open(running: Issuer, provider: Provider, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidToken):
        provider.verify(running.token(**changes))


def test_clocks_may_differ_a_little(running: Issuer, provider: Provider) -> None:
    moment = int(time.time())

    assert provider.verify(running.token(exp=moment - 10, nbf=moment + 10, iat=moment + 10))


def test_a_token_that_was_tampered_with_does_not_open(running: Issuer, provider: Provider) -> None:
    head, _, signature = running.token().split(".")
    promoted = segment(running.claims(scope="pdtrim:admin"))
    stranger = ec_key("first")

    for token in (f"{head}.{promoted}.{signature}", f"{head}.{promoted}.", running.token(key=stranger)):
        with pytest.raises(InvalidToken):
            provider.verify(token)


def test_a_signature_that_anyone_can_make_does_not_open(running: Issuer, provider: Provider) -> None:
    key = rsa_key("first")
    running.keys = [key]
    claims = segment(running.claims())
    unsigned = [f"{segment({'alg': alg, 'kid': 'first'})}.{claims}." for alg in ("none", "None", "NONE")]
    public = key.as_pem(private=False)
    signed = f"{segment({'alg': 'HS256', 'kid': 'first'})}.{claims}"
    with_public_key = base64.urlsafe_b64encode(hmac.digest(public, signed.encode(), "sha256")).rstrip(b"=").decode()

    for token in (*unsigned, f"{signed}.{with_public_key}"):
        with pytest.raises(InvalidToken, match="unsupported_algorithm"):
            provider.verify(token)


def test_a_shared_secret_among_the_keys_verifies_nothing(running: Issuer, provider: Provider) -> None:
    secret = OctKey.generate_key(256, {"kid": "shared"})
    published = {"keys": [secret.as_dict(private=True), running.keys[0].as_dict(private=False), {"kty": "new"}, 7]}
    running.documents["/keys"] = json.dumps(published).encode()

    with pytest.raises(InvalidToken):
        provider.verify(running.token(key=secret, alg="HS256"))
    assert provider.verify(running.token())


@pytest.mark.parametrize(
    "token",
    [
        "ey.e.e",
        "eyJhbGciOiJFUzI1NiJ9.e30.AA",
        f"{segment({'alg': ['ES256'], 'kid': 'first'})}.e30.AA",
        f"{segment({'alg': 'ES256', 'kid': {'a': 1}})}.e30.AA",
        f"{segment({'alg': 'ES256', 'kid': 'first', 'crit': ['b64'], 'b64': False})}.e30.AA",
        f"{base64.urlsafe_b64encode(b'[1]').decode()}.e30.AA",
        f"{segment({'kid': 'first'})}.e30.AA",
        "eyJ" + "A" * 100_000 + ".e30.AA",
    ],
)
def test_what_is_no_token_does_not_open(provider: Provider, token: str) -> None:
    with pytest.raises(InvalidToken):
        provider.verify(token)


def test_an_unknown_header_parameter_is_ignored(running: Issuer, provider: Provider) -> None:
    head = {"alg": "ES256", "kid": "first", "nonce": "x"}
    registry = oidc.REGISTRY

    assert provider.verify(jwt.encode(head, running.claims(), running.keys[0], registry=registry))


@pytest.mark.usefixtures("eager")
def test_a_new_key_is_found_and_a_withdrawn_one_is_forgotten(running: Issuer, provider: Provider) -> None:
    before = running.token()
    assert provider.verify(before)
    running.keys = [ec_key("second")]

    assert provider.verify(running.token())
    with pytest.raises(InvalidToken):
        provider.verify(before)


def test_invented_keys_cost_the_provider_little(running: Issuer, provider: Provider) -> None:
    invented = ec_key("invented")
    with ThreadPoolExecutor(8) as requests:

        def refused(_: int) -> bool:
            try:
                provider.verify(running.token(key=invented))
            except InvalidToken:
                return True
            return False

        assert all(requests.map(refused, range(40)))
    assert running.asked == [DISCOVERY, "/keys"]


def test_while_the_provider_is_away_known_keys_go_on_and_others_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (port,) = free_ports(1)
    with issuer(port) as running:
        provider = Provider(running.url, AUDIENCE)
        known = running.token()
        provider.verify(known)
    monkeypatch.setattr(oidc, "PAUSE_S", 0.0)
    monkeypatch.setattr(oidc, "KEPT_S", 0.0)

    assert provider.verify(known)
    with pytest.raises(ProviderAway, match="does not answer"):
        provider.verify(running.token(key=ec_key("new")))
    monkeypatch.setattr(oidc, "OUTLIVED_S", 0.0)
    with pytest.raises(ProviderAway, match="cannot be read"):
        provider.verify(known)
    with issuer(port, running.keys):
        monkeypatch.setattr(oidc, "OUTLIVED_S", 60.0)
        assert provider.verify(known)


def test_a_provider_that_says_nothing_holds_up_nobody_whose_key_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    with issuer(port) as running:
        provider = Provider(running.url, AUDIENCE)
        known = running.token()
        provider.verify(known)
    monkeypatch.setattr(oidc, "KEPT_S", 0.0)
    monkeypatch.setattr(oidc, "ANSWER_S", 1.0)
    monkeypatch.setattr(provider, "_asked_at", None)

    def seconds(_: int) -> float:
        started = time.monotonic()
        assert provider.verify(known)
        return time.monotonic() - started

    with socket.create_server(("127.0.0.1", port), backlog=64), ThreadPoolExecutor(8) as requests:
        assert max(requests.map(seconds, range(8))) < 0.7


def test_for_a_name_that_is_looked_up_for_ever_few_requests_wait_and_not_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closing, looked_up = Event(), list[str]()

    def silent(host: str, *arguments: object, **options: object) -> None:
        looked_up.append(host)
        closing.wait()
        raise OSError("nobody knows that name")

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    monkeypatch.setattr(oidc, "WAIT_S", 2.0)
    monkeypatch.setattr(oidc, "PAUSE_S", 0.0)
    monkeypatch.setattr(oidc, "WAITING", 2)
    provider = Provider("https://login.example.com", AUDIENCE)

    def seconds(_: int) -> float:
        started = time.monotonic()
        with pytest.raises(ProviderAway):
            provider.verify("eyJhbGciOiJFUzI1NiJ9.e30.AA")
        return time.monotonic() - started

    with ThreadPoolExecutor(8) as requests:
        times = sorted(requests.map(seconds, range(8)))
    assert times[5] < 1.5 < times[6] < 6
    assert looked_up.count("login.example.com") == 1
    closing.set()
    assert provider._read_out.wait(10)  # What it logs is this test's.


def test_a_provider_that_was_never_there_is_asked_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    (port,) = free_ports(1)
    provider = Provider(f"http://127.0.0.1:{port}", AUDIENCE)
    for _ in range(3):
        with pytest.raises(ProviderAway):
            provider.verify("eyJhbGciOiJFUzI1NiJ9.e30.AA")

    # Only its own: a reading that another test gave up may end, and say so, while this one runs.
    said = [record for record in caplog.records if f":{port} were not read" in record.getMessage()]
    assert len(said) == 1


@pytest.mark.parametrize(
    ("path", "content"),
    [
        (DISCOVERY, b"<html>"),
        (DISCOVERY, b"[]"),
        (DISCOVERY, b'{"issuer": "https://another.example", "jwks_uri": "URL/keys"}'),
        (DISCOVERY, b'{"issuer": "URL", "jwks_uri": "http://keys.example/keys"}'),
        (DISCOVERY, b'{"issuer": "URL", "jwks_uri": "file:///etc/passwd"}'),
        (DISCOVERY, b'{"issuer": "URL", "jwks_uri": "URL/nothing"}'),
        ("/keys", b'{"keys": 3}'),
        ("/keys", b'{"keys": []' + b" " * oidc.MAX_ANSWER_BYTES + b"}"),
    ],
)
def test_what_a_provider_should_not_say_is_not_believed(
    running: Issuer, provider: Provider, path: str, content: bytes
) -> None:
    running.documents[path] = content.replace(b"URL", running.url.encode())

    with pytest.raises(ProviderAway):
        provider.verify(running.token())


def test_a_provider_that_answers_byte_by_byte_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oidc, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        provider = Provider(f"http://127.0.0.1:{listening.getsockname()[1]}", AUDIENCE)

        def dribble() -> None:
            near, _ = listening.accept()
            with near, suppress(OSError):
                near.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                while True:
                    near.sendall(b" ")
                    time.sleep(0.02)

        with ThreadPoolExecutor(1) as pool:
            pool.submit(dribble)
            started = time.monotonic()
            with pytest.raises(ProviderAway):
                provider.verify("eyJhbGciOiJFUzI1NiJ9.e30.AA")

    assert time.monotonic() - started < 3


def test_claims_are_found_by_path_and_read_as_words() -> None:
    claims = {"a.b": "1", "a": {"c": {"d": ["x", 3, "y"]}}, "scope": "x  y"}

    assert oidc.claim(claims, "a.b") == "1"
    assert oidc.words(oidc.claim(claims, "a.c.d")) == ["x", "y"]
    assert oidc.words(oidc.claim(claims, "scope")) == ["x", "y"]
    assert oidc.words(oidc.claim(claims, "a.c.d.e")) == []
