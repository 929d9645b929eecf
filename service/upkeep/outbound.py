"""Requests to addresses that users chose: to public ones only, unless the operator allows more.

What a name stands for is looked up for each connection, every address found is checked, and the connection goes to one
of those very addresses, while TLS still verifies the name. So a name that answers differently the second time (DNS
rebinding) reaches nothing. There are no redirects, proxies, cookies or content codings to be led astray by: httpcore
knows none of them.
"""

from __future__ import annotations

import logging
import re
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import anyio
import httpcore
import httpx

from service.upkeep.lookups import Lookups, Resolve, resolve

log = logging.getLogger(__name__)

TOTAL_SECONDS = 10.0
MAX_ANSWER_BYTES = 1 << 16
EXCERPT_BYTES = 1 << 10

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# What Python 3.11 calls global although it is not, or what is dangerous although it is (IANA special-purpose
# registries; 168.63.129.16 is the host in Azure's virtual networks).
SPECIAL = tuple(
    ip_network(network) for network in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "2001::/23", "3fff::/20")
)
GLOBAL_UNICAST = IPv6Network("2000::/3")
NAT64 = IPv6Network("64:ff9b::/96")
NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.IGNORECASE)


class NotAllowed(ValueError):
    """The service sends nothing there; the message names no address that a name stands for."""


class Unanswered(Exception):
    """No answer came: the name is unknown, nothing listens, TLS failed, or it took too long."""


@dataclass(frozen=True)
class Policy:
    """Where requests may go besides public addresses over https."""

    allowed: tuple[Network, ...] = ()
    allow_http: bool = False

    def refusal(self, address: Address, scheme: str) -> str | None:
        """Why there is no connection to an address; None where it may be made."""
        reached = _reached(address)
        if any(reached in network for network in self.allowed):
            return None
        if not _is_public(reached):
            return "it is not a public address"
        return None if scheme == "https" or self.allow_http else "only https:// goes to public addresses"


@dataclass
class Answer:
    """What came back: the status (0 until it is there), the headers by lower-case name, the beginning of the body."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)

    @property
    def excerpt(self) -> str:
        """How the body begins, without what cannot be printed."""
        text = self.body[:EXCERPT_BYTES].decode("utf-8", "replace")
        return "".join(character for character in text if character.isprintable() or character in "\n\t")


def check_url(text: str, policy: Policy) -> httpx.URL:
    """The URL, if nothing that can be seen without a look-up forbids it; the rest is seen on connecting.

    Raises: NotAllowed.
    """
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise NotAllowed(f"this is no URL: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise NotAllowed("a URL begins with https:// and a host")
    if url.port is not None and not 0 < url.port < 1 << 16:
        raise NotAllowed("a port is a number from 1 to 65535")
    if url.userinfo:
        raise NotAllowed("a URL carries neither user nor password")
    host = url.raw_host.decode()
    # RFC 6761: no resolver should find anything else.
    address = ip_address("127.0.0.1") if f".{host}".endswith(".localhost") else _literal(host)
    refusal = None if address is None else policy.refusal(address, url.scheme)
    if refusal is not None:
        raise NotAllowed(f"nothing is sent to {host}: {refusal}")
    if address is None and url.scheme == "http" and not policy.allow_http and not policy.allowed:
        raise NotAllowed("only https:// is allowed")
    return url


@cache
def _trusted() -> ssl.SSLContext:
    """The authorities of certifi, or of SSL_CERT_FILE or SSL_CERT_DIR; reading them takes a tenth of a second."""
    return httpx.create_ssl_context()


class Outbound:
    """Sends requests under a policy. `find` and `dial` stand for the system's resolver and network.

    One for as long as requests are sent: it knows which names are still being looked up.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        find: Resolve = resolve,
        dial: httpcore.AsyncNetworkBackend | None = None,
        ssl_context: ssl.SSLContext | None = None,
        total_seconds: float = TOTAL_SECONDS,
    ) -> None:
        self._policy = policy
        self._lookups = Lookups(find)
        self._dial = dial or httpcore.AnyIOBackend()
        self._ssl_context = ssl_context or _trusted()
        self._total_seconds = total_seconds

    async def post(self, url: str, content: bytes, headers: Mapping[str, str]) -> Answer:
        """POST. An answer counts once its head is there; of its body, what fits into time and bound is read.

        Raises: NotAllowed; Unanswered.
        """
        checked, answer, reason = check_url(url, self._policy), Answer(), f"no answer within {self._total_seconds:g} s"
        with anyio.move_on_after(self._total_seconds):
            try:
                await self._exchange(checked, content, headers, answer)
            except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
                reason = str(error) or type(error).__name__
        if not answer.status:
            raise Unanswered(reason)
        return answer

    async def _exchange(self, url: httpx.URL, content: bytes, headers: Mapping[str, str], answer: Answer) -> None:
        backend = _Guarded(self._policy, url.scheme, self._lookups, self._dial)
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        sent = [("Host", url.netloc.decode()), ("Accept-Encoding", "identity"), ("Connection", "close")]
        async with (
            httpcore.AsyncConnectionPool(ssl_context=self._ssl_context, network_backend=backend) as pool,
            pool.stream("POST", target, headers=[*sent, *headers.items()], content=content) as response,
        ):
            answer.status = response.status
            answer.headers = {name.decode("latin-1").lower(): v.decode("latin-1") for name, v in response.headers}
            async for part in response.aiter_stream():
                answer.body += part
                if len(answer.body) >= MAX_ANSWER_BYTES:
                    return


class _Guarded(httpcore.AsyncNetworkBackend):
    """Connects to addresses that the policy allows; to none of a name's while one of them is not allowed."""

    def __init__(self, policy: Policy, scheme: str, lookups: Lookups, dial: httpcore.AsyncNetworkBackend) -> None:
        self._policy, self._scheme, self._lookups, self._dial = policy, scheme, lookups, dial

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        failure: Exception = OSError(f"{host} has no address")
        for address in await self._allowed(host, port):
            try:
                return await self._dial.connect_tcp(str(address), port, timeout, local_address, socket_options)
            except httpcore.ConnectError as error:
                failure = error
        raise failure

    async def _allowed(self, host: str, port: int) -> list[Address]:
        literal = _literal(host)
        found = [literal] if literal is not None else []
        if not found:
            found = [ip_address(name) for name in dict.fromkeys(await self._lookups.addresses(host, port))]
        for address in found:
            refusal = self._policy.refusal(address, self._scheme)
            if refusal is not None:
                log.warning("nothing is sent to %s, which is %s: %s", host, address, refusal)
                raise NotAllowed(f"nothing is sent to {host}: {refusal}")
        return found


def _literal(host: str) -> Address | None:
    """The address that a host is, without a look-up. Raises: NotAllowed for what resolvers read in different ways."""
    try:
        return ip_address(host)
    except ValueError:
        if NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]):
            raise NotAllowed(f"{host} is neither a name nor an address as four decimal numbers") from None
        return None


def _reached(address: Address) -> Address:
    """The IPv4 address in an IPv6 one that is mapped (RFC 4291), 6to4 (RFC 3056) or NAT64 (RFC 6052); else itself."""
    if isinstance(address, IPv4Address):
        return address
    embedded = address.ipv4_mapped or address.sixtofour
    if embedded is None and address in NAT64:
        embedded = IPv4Address(int(address) & 0xFFFFFFFF)
    return embedded or address


def _is_public(address: Address) -> bool:
    if isinstance(address, IPv6Address) and address not in GLOBAL_UNICAST:
        return False
    if address.is_multicast or address.is_reserved or any(address in network for network in SPECIAL):
        return False
    return address.is_global
