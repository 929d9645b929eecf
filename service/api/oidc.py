"""Bearer tokens of an OpenID provider (OpenID Connect Discovery 1.0, JSON Web Tokens as RFC 8725 would have them).

The provider's keys are read when the first token comes, and kept. A key that is not among them is looked for, at most
every half minute, so that tokens with invented keys cost the provider nothing. They are read in a thread of their own,
for which few requests wait, and not for long: a provider that says nothing holds up whoever needs its keys, and nobody
else.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from threading import BoundedSemaphore, Event, Lock, Thread
from typing import Any

import httpx
from joserfc import jwt
from joserfc.errors import InvalidKeyIdError, JoseError
from joserfc.jwk import JWKRegistry, Key, KeySet
from joserfc.jws import JWSRegistry
from joserfc.jwt import JWTClaimsRegistry, Token

from service.settings import is_authentic

log = logging.getLogger(__name__)

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519")
"""Signatures with public keys alone: `none` signs nothing, and with HS256 a public key would do for signing."""
# A header parameter that is not known is to be ignored (RFC 7515 § 4), unless it is critical.
REGISTRY = JWSRegistry(algorithms=ALGORITHMS, strict_check_header=False)
LEEWAY_S = 30
KEPT_S = 3600.0
"""After this, keys are read again."""
OUTLIVED_S = 86_400.0
"""Keys are used for so long at the most while the provider does not answer."""
PAUSE_S = 30.0
"""Between two times that the provider is asked."""
ANSWER_S = 3.0
WAIT_S = 5.0
"""How long a request waits for keys that are being read. Looking up a provider's name has no limit of its own."""
WAITING = 12
"""Requests that wait, at most: each holds one of the gateway's threads."""
MAX_ANSWER_BYTES = 1 << 20


class InvalidToken(Exception):
    """The token does not open; the message is for the log."""


class ProviderAway(Exception):
    """The provider's keys cannot be read, and without them nobody knows what the token is worth."""


@dataclass(frozen=True)
class _Keys:
    """What was read, and when (monotonic seconds)."""

    keys: KeySet
    read_at: float


class Provider:
    """An OpenID provider, known by its issuer URL. Safe to use from many threads."""

    def __init__(self, issuer: str, audience: str) -> None:
        self._issuer = issuer
        self._claims = JWTClaimsRegistry(
            leeway=LEEWAY_S,
            iss={"essential": True, "value": issuer},
            aud={"essential": True, "value": audience},
            exp={"essential": True},
            sub={"essential": True},
        )
        self._beginning = Lock()
        self._waiting = BoundedSemaphore(WAITING)
        self._read_out = Event()
        """Set while nobody reads."""
        self._read_out.set()
        self._keys: _Keys | None = None
        self._asked_at: float | None = None
        self._answered = False

    def verify(self, token: str) -> dict[str, Any]:
        """The claims of a token. Raises: InvalidToken; ProviderAway."""
        try:
            decoded = self._decode(token)
            self._claims.validate(decoded.claims)
        except (JoseError, ValueError, TypeError, AttributeError) as error:
            # joserfc trusts the shape of a header that it has not verified yet.
            raise InvalidToken(str(error)) from error
        return decoded.claims

    def _decode(self, token: str) -> Token:
        held = self._current()
        try:
            return jwt.decode(token, held.keys, registry=REGISTRY)
        except InvalidKeyIdError:
            newer = self._newer(held)
            if newer is None:
                raise
            return jwt.decode(token, newer.keys, registry=REGISTRY)

    def _current(self) -> _Keys:
        """Keys that may be used now. Raises: ProviderAway."""
        held = self._keys
        if held is not None and time.monotonic() - held.read_at < KEPT_S:
            return held
        usable = held is not None and time.monotonic() - held.read_at < OUTLIVED_S
        self._ask(held, wait=not usable)
        held = self._keys
        if held is None or time.monotonic() - held.read_at > OUTLIVED_S:
            raise ProviderAway(f"the keys of {self._issuer} cannot be read")
        return held

    def _newer(self, held: _Keys) -> _Keys | None:
        """Keys that were read after these; None when there are none. Raises: ProviderAway when there may be some."""
        self._ask(held, wait=True)
        if not self._answered or not self._read_out.is_set():
            raise ProviderAway(f"{self._issuer} does not answer, and the token's key is not known")
        return None if self._keys is held else self._keys

    def _ask(self, held: _Keys | None, *, wait: bool) -> None:
        """Have the keys read, unless they are being read, that was tried just now, or there are newer ones than `held`.

        Then `wait` for them, if not too many do, or leave it at that.
        """
        with self._beginning:
            recently = self._asked_at is not None and time.monotonic() - self._asked_at < PAUSE_S
            if self._read_out.is_set() and not recently and self._keys is held:
                self._asked_at = time.monotonic()
                self._read_out.clear()
                Thread(target=self._renew, name="oidc", daemon=True).start()
        if wait and self._waiting.acquire(blocking=False):
            try:
                self._read_out.wait(WAIT_S)
            finally:
                self._waiting.release()

    def _renew(self) -> None:
        try:
            self._keys, self._answered = _Keys(self._read(), time.monotonic()), True
        except (httpx.HTTPError, OSError, ValueError, KeyError, TypeError, AttributeError, JoseError) as error:
            log.warning("the keys of %s were not read: %s", self._issuer, error)
            self._answered = False
        finally:
            self._read_out.set()

    def _read(self) -> KeySet:
        """Raises: httpx.HTTPError; ValueError and its like for what is no such document."""
        with httpx.Client(timeout=ANSWER_S, follow_redirects=False) as client:
            document = _get_json(client, f"{self._issuer.rstrip('/')}/.well-known/openid-configuration")
            if document["issuer"] != self._issuer:
                raise ValueError(f"it calls itself {document['issuer']!r}")
            address = document["jwks_uri"]
            if not is_authentic(address):
                raise ValueError(f"its keys are at {address!r}, which is not https://")
            found = _get_json(client, address)
        return KeySet([key for one in found["keys"] if (key := _imported(one)) is not None])


def _imported(found: Any) -> Key | None:
    """A key; None for one of a kind that we do not know, which is no reason to do without the others."""
    try:
        return JWKRegistry.import_key(found)
    except (JoseError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.info("a key is left out: %s", error)
        return None


def _get_json(client: httpx.Client, url: str) -> Any:
    """A JSON document, within bounds of time and size. Raises: httpx.HTTPError; ValueError."""
    # Sent as it is: what a content coding unpacks to has no bound.
    deadline, content = time.monotonic() + ANSWER_S, bytearray()
    with client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as response:
        response.raise_for_status()
        for part in response.iter_raw():
            content += part
            if len(content) > MAX_ANSWER_BYTES or time.monotonic() > deadline:
                raise ValueError(f"{url} gives more than {MAX_ANSWER_BYTES} bytes, or takes longer than {ANSWER_S:g} s")
    return json.loads(content)


def claim(claims: dict[str, Any], path: str) -> Any:
    """A claim by its name, or by a dotted path into claims that are objects; None where there is none."""
    if path in claims:
        return claims[path]
    found: Any = claims
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def words(value: Any) -> list[str]:
    """What a claim says: the words of a text (RFC 8693 `scope`), or the texts of a list."""
    if isinstance(value, str):
        return value.split()
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []
