"""Browser sessions: a cookie that holds the caller's key, encrypted and authenticated (JWE). No gateway keeps any.

The cookie opens what only reads under /v1, and the dashboard, where whatever changes something also needs the session's
CSRF token.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie

from fastapi import Response
from joserfc import jwe
from joserfc.errors import JoseError
from joserfc.jwk import OctKey
from pydantic import SecretStr
from starlette.datastructures import Headers

COOKIE = "pdtrim_session"
LIFE_S = 12 * 3600
"""How long a session lasts from its login on."""
MAX_TOKEN_BYTES = 2600
"""Browsers keep cookies of up to 4096 bytes; encryption and Base64 make it a third longer."""
HEADER = {"alg": "dir", "enc": "A256GCM"}


@dataclass(frozen=True)
class Session:
    """A browser's session. `token` is the API key or bearer token as a header would carry it; empty without a login."""

    token: str = ""
    csrf: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    since: float = field(default_factory=time.time)

    def sent(self, csrf: str) -> bool:
        """Whether a form that carries `csrf` was made in this session."""
        return hmac.compare_digest(csrf.encode("utf-8", "replace"), self.csrf.encode())


class Sessions:
    """Writes sessions into cookies and reads them. Without a secret, one that lasts as long as this process."""

    def __init__(self, secret: SecretStr | None) -> None:
        given = secrets.token_bytes(32) if secret is None else secret.get_secret_value().encode()
        self._key = OctKey.import_key(hashlib.sha256(b"pdtrim session " + given).digest())

    def read(self, headers: Headers) -> Session | None:
        """The session of a request; None without a cookie that is whole, ours and young enough."""
        try:
            cookie = SimpleCookie(headers.get("Cookie", "")).get(COOKIE)
            if cookie is None:
                return None
            plain = jwe.decrypt_compact(cookie.value, self._key, algorithms=list(HEADER.values())).plaintext
            session = Session(**json.loads(plain or b""))
        except (CookieError, JoseError, ValueError, TypeError):
            return None
        return session if 0 <= time.time() - session.since < LIFE_S else None

    def write(self, response: Response, session: Session, *, secure: bool) -> None:
        """Set the cookie; `secure` keeps it off plain HTTP."""
        plain = json.dumps(vars(session)).encode()
        value = jwe.encrypt_compact(HEADER, plain, self._key, algorithms=list(HEADER.values()))
        response.set_cookie(COOKIE, value, path="/", httponly=True, samesite="strict", secure=secure)


def is_https(scheme: str, headers: Headers) -> bool:
    """Whether the browser came by https. A proxy's word is taken: a lie costs only whoever tells it."""
    return scheme == "https" or headers.get("X-Forwarded-Proto", "").partition(",")[0].strip() == "https"
