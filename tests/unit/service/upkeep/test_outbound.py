"""Where requests may go, with real connections: what is refused must not even be dialled."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterable
from ipaddress import ip_network
from threading import Event
from typing import Any

import anyio
import httpcore
import pytest
import trustme

from service.upkeep.outbound import MAX_ANSWER_BYTES, Answer, NotAllowed, Outbound, Policy, Unanswered, check_url
from tests.receiver import Reply, receiving
from tests.servers import free_ports

PUBLIC = "8.8.8.8"
LOOPBACK = Policy((ip_network("127.0.0.0/8"),))


class Dial(httpcore.AnyIOBackend):
    """The real network, which remembers what it was asked to connect to; with a `detour`, it connects there instead."""

    def __init__(self, detour: str | None = None) -> None:
        self.dialled: list[str] = []
        self._detour = detour

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        self.dialled.append(host)
        return await super().connect_tcp(self._detour or host, port, timeout, local_address, socket_options)


def post(url: str, policy: Policy = LOOPBACK, *, total_seconds: float = 5.0, **options: Any) -> Answer:
    outbound = Outbound(policy, total_seconds=total_seconds, **options)
    return anyio.run(outbound.post, url, b"{}", {"Content-Type": "application/json"})


def found(*addresses: str) -> Callable[[str, int], list[str]]:
    return lambda host, port: list(addresses)


NOT_PUBLIC = [
    "127.0.0.1", "127.8.9.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1",
    "100.100.100.200", "169.254.169.254", "192.0.0.192", "192.0.2.1", "198.18.0.1", "203.0.113.1", "224.0.0.1",
    "224.0.1.1", "240.0.0.1", "255.255.255.255", "168.63.129.16", "192.88.99.1",
    "::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "::10.0.0.1",
    "64:ff9b::a00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a00:1", "2002:7f00:1::1", "2002:a00:1::", "2001::1",
    "2001:db8::1", "3fff::1", "5f00::1", "100::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1",
    "ff0e::1", "4000::1",
]  # fmt: skip
ON_THE_INTERNET = [
    "8.8.8.8",
    "172.32.0.1",
    "100.128.0.1",
    "2606:4700:4700::1111",
    "64:ff9b::808:808",
    "2002:808:808::1",
]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_an_address_that_is_not_public_is_not_dialled(address: str) -> None:
    dial, host = Dial(), f"[{address}]" if ":" in address else address

    for policy in (Policy(), Policy(allow_http=True)):
        for scheme in ("http", "https"):
            with pytest.raises(NotAllowed):
                post(f"{scheme}://{host}:1/", policy, dial=dial)
            with pytest.raises(NotAllowed):
                post(f"{scheme}://hooks.example.com:1/", policy, dial=dial, find=found(PUBLIC, address))
    assert dial.dialled == []


@pytest.mark.parametrize("address", ON_THE_INTERNET)
def test_a_public_address_is_dialled_over_https_alone_unless_http_is_allowed(address: str) -> None:
    dial = Dial(detour="127.0.0.1")
    with receiving() as server:
        url = f"hooks.example.com:{server.port}/"
        for policy in (Policy(), LOOPBACK):
            with pytest.raises(NotAllowed, match="https"):
                post(f"http://{url}", policy, dial=dial, find=found(address))
        assert dial.dialled == []
        assert post(f"http://{url}", Policy(allow_http=True), dial=dial, find=found(address)).status == 204
        with pytest.raises(Unanswered, match="SSL"):  # The receiver speaks none.
            post(f"https://{url}", Policy(), dial=dial, find=found(address))

    assert dial.dialled == [address, address]


FORMS = ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "0.0.0.0", "[::]"]
ODD_FORMS = ["2130706433", "0x7f000001", "0x7f.1", "127.1", "017700000001", "0177.0.0.1", "127.0.0.1.", "127.0.0.0x1"]


@pytest.mark.parametrize("host", [*FORMS, *ODD_FORMS])
def test_no_form_of_this_machines_address_is_connected_to(host: str) -> None:
    with receiving() as server:
        for policy in (Policy(), Policy(allow_http=True)):
            for scheme in ("http", "https"):
                with pytest.raises(NotAllowed):
                    post(f"{scheme}://{host}:{server.port}/", policy)

    assert server.connections == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"])
def test_where_the_operator_allows_it_the_same_forms_arrive(host: str) -> None:
    with receiving() as server:
        # Some systems find ::1 for localhost first, where nothing listens.
        policy = Policy((ip_network("127.0.0.0/8"), ip_network("::1/128")))
        assert post(f"http://{host}:{server.port}/", policy).status == 204

    assert server.connections == 1


@pytest.mark.parametrize("host", ODD_FORMS)
def test_hosts_that_resolvers_read_in_different_ways_are_refused_wherever_they_lead(host: str) -> None:
    with receiving() as server, pytest.raises(NotAllowed, match=r"nor an address|Invalid IPv4"):
        post(f"http://{host}:{server.port}/")

    assert server.connections == 0


def test_a_name_that_also_stands_for_a_private_address_is_not_connected_to() -> None:
    dial = Dial()
    with receiving() as server:
        for addresses in ((PUBLIC, "127.0.0.1"), ("127.0.0.1", PUBLIC), (PUBLIC, "10.0.0.1"), (PUBLIC, "::ffff:a00:1")):
            with pytest.raises(NotAllowed, match=r"hooks\.example\.com: it is not a public address") as refused:
                post(f"https://hooks.example.com:{server.port}/", Policy(), find=found(*addresses), dial=dial)
            assert not any(address in str(refused.value) for address in addresses)

    assert (dial.dialled, server.connections) == ([], 0)


def test_a_name_is_looked_up_once_a_connection_and_what_was_found_is_what_is_dialled() -> None:
    answers, dial = [[PUBLIC], ["127.0.0.1"]], Dial(detour="127.0.0.1")
    policy = Policy(allow_http=True)
    with receiving() as server:
        url = f"http://rebinds.example.com:{server.port}/"
        assert post(url, policy, find=lambda host, port: answers.pop(0), dial=dial).status == 204
        with pytest.raises(NotAllowed):
            post(url, policy, find=lambda host, port: answers.pop(0), dial=dial)

    assert (dial.dialled, answers, server.connections) == ([PUBLIC], [], 1)
    assert server.requests[0].headers["Host"] == f"rebinds.example.com:{server.port}"


def test_of_several_addresses_the_next_is_tried_when_one_does_not_answer() -> None:
    with receiving(host="127.0.0.1") as server:
        answer = post(f"http://hooks.example.com:{server.port}/", find=found("127.9.9.9", "127.0.0.1"))

    assert (answer.status, server.connections) == (204, 1)


def test_a_redirect_is_not_followed() -> None:
    with receiving(host="127.0.0.2") as private, receiving(Reply(307, {"Location": private.url})) as server:
        answer = post(server.url, Policy((ip_network("127.0.0.1/32"),)))

    assert (answer.status, answer.headers["location"]) == (307, private.url)
    assert (server.connections, private.connections) == (1, 0)


def test_no_proxy_is_asked_and_no_cookie_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as proxy, receiving(Reply(200, {"Set-Cookie": "a=b"})) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        outbound = Outbound(LOOPBACK)
        for _ in range(2):
            anyio.run(outbound.post, server.url, b"{}", {})

    assert (proxy.connections, server.connections) == (0, 2)
    assert all("Cookie" not in request.headers for request in server.requests)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def serving_tls(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


def test_tls_verifies_the_name_while_the_connection_goes_to_the_address(authority: trustme.CA) -> None:
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with receiving(tls=serving_tls(authority, "hooks.example.com")) as server:
        options: dict[str, Any] = {"find": found("127.0.0.1"), "ssl_context": trusting}

        assert post(f"https://hooks.example.com:{server.port}/", **options).status == 204
        with pytest.raises(Unanswered, match="CERTIFICATE_VERIFY_FAILED"):
            post(f"https://other.example.com:{server.port}/", **options)
        with pytest.raises(Unanswered, match="CERTIFICATE_VERIFY_FAILED"):
            post(f"https://127.0.0.1:{server.port}/", **options)
        with pytest.raises(Unanswered, match="CERTIFICATE_VERIFY_FAILED"):  # Nobody vouches for this authority.
            post(f"https://hooks.example.com:{server.port}/", find=found("127.0.0.1"))

    assert len(server.requests) == 1


def drip(write: Callable[[bytes], object]) -> None:
    for _ in range(1000):
        write(b"x")
        time.sleep(0.02)


def flood(write: Callable[[bytes], object]) -> None:
    while True:
        write(b"y" * 8192)


@pytest.mark.parametrize("stream", [drip, flood])
def test_an_endless_answer_is_cut_and_its_status_counts(stream: Callable[[Callable[[bytes], object]], None]) -> None:
    with receiving(Reply(200, stream=stream)) as server:
        began = time.monotonic()
        answer = post(server.url, total_seconds=1.5)

    assert time.monotonic() - began < 10
    assert (answer.status, set(answer.excerpt) <= {"x", "y"}) == (200, True)
    assert len(answer.body) < 2 * MAX_ANSWER_BYTES
    assert len(answer.excerpt) <= 1024


def test_a_server_that_accepts_and_says_nothing_is_cut() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        began = time.monotonic()
        with pytest.raises(Unanswered, match=r"no answer within 0\.5 s"):
            post(f"http://127.0.0.1:{listener.getsockname()[1]}/", total_seconds=0.5)

    assert time.monotonic() - began < 10


def test_a_slow_resolver_is_left_behind() -> None:
    over = Event()

    def find(host: str, port: int) -> list[str]:
        over.wait(30)
        return ["127.0.0.1"]

    began = time.monotonic()
    with pytest.raises(Unanswered, match="no answer within"):
        post("https://hooks.example.com/", find=find, total_seconds=0.2)
    over.set()

    assert time.monotonic() - began < 10


def test_what_does_not_answer_is_said() -> None:
    with pytest.raises(Unanswered):
        post(f"http://127.0.0.1:{free_ports(1)[0]}/")
    with pytest.raises(Unanswered, match="no address"):
        post("https://hooks.example.com/", find=found())
    with pytest.raises(Unanswered):
        post(f"https://{'a' * 64}.example.com/")


def test_an_excerpt_is_short_and_can_be_printed_and_stored() -> None:
    with receiving(Reply(500, body=b"\x00\x1b[31mno\xff\n" + b"a" * 2000)) as server:
        answer = post(server.url)

    assert answer.excerpt.startswith("[31mno\ufffd\na")
    assert len(answer.excerpt) <= 1024


@pytest.mark.parametrize(
    "url",
    [
        "", "hooks.example.com", "//hooks.example.com/", "ftp://hooks.example.com/", "file:///etc/passwd",
        "gopher://hooks.example.com/", "https://", "https:///path", "https://user@hooks.example.com/",
        "https://user:password@hooks.example.com/", "https://:@127.0.0.1/", "https://hooks.example.com:port/",
        "https://hooks.example.com:99999/", "https://hooks.example.com:0/",
        "https://[::1/", "https://a\nb/", "https://10.0.0.1/", "https://2130706433/",
        "https://localhost/", "https://api.localhost/", "http://hooks.example.com/", "https://127.0.0.1\\@example.com/",
    ],
)  # fmt: skip
def test_a_url_that_can_be_seen_to_be_wrong_is_refused(url: str) -> None:
    with pytest.raises(NotAllowed):
        check_url(url, Policy())


@pytest.mark.parametrize(
    ("url", "policy"),
    [
        ("https://hooks.example.com/a?b=c", Policy()),
        ("https://hooks.example.com:8443/", Policy()),
        ("https://8.8.8.8/", Policy()),
        ("http://hooks.example.com/", Policy(allow_http=True)),
        ("http://hooks.example.com/", LOOPBACK),
        ("http://127.0.0.1:8080/", LOOPBACK),
        ("https://xn--mnchen-3ya.example/", Policy()),
    ],
)
def test_a_url_that_may_be_right_is_kept_as_it_is(url: str, policy: Policy) -> None:
    assert str(check_url(url, policy)) == url
