"""An OpenID provider on this machine: a real HTTP server with a discovery document, keys, and tokens to hand out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from joserfc import jwt
from joserfc.jwk import ECKey, Key, RSAKey

AUDIENCE = "pdtrim"
DISCOVERY = "/.well-known/openid-configuration"


def rsa_key(kid: str) -> RSAKey:
    return RSAKey.generate_key(2048, {"kid": kid, "use": "sig"})


def ec_key(kid: str) -> ECKey:
    return ECKey.generate_key("P-256", {"kid": kid, "use": "sig"})


@dataclass
class Issuer:
    """The provider. `keys` are published; `documents` replace what is at a path; `asked` remembers the paths."""

    url: str
    keys: list[Key]
    documents: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def document(self, path: str) -> bytes | None:
        published = {
            DISCOVERY: {"issuer": self.url, "jwks_uri": f"{self.url}/keys"},
            "/keys": {"keys": [key.as_dict(private=False) for key in self.keys]},
        }
        if path in self.documents:
            return self.documents[path]
        return json.dumps(published[path]).encode() if path in published else None

    def claims(self, **changes: Any) -> dict[str, Any]:
        """The claims of a token that opens; a change to None leaves one out."""
        given = {
            "iss": self.url,
            "aud": AUDIENCE,
            "sub": "someone",
            "iat": int(time.time()),
            "exp": int(time.time()) + 300,
            "project": "ours",
            "scope": "openid pdtrim:read pdtrim:submit",
        }
        return {name: value for name, value in (given | changes).items() if value is not None}

    def token(self, *, key: Key | None = None, alg: str | None = None, kid: str | None = None, **changes: Any) -> str:
        """A token, signed with the first key unless another is given."""
        key = key or self.keys[0]
        alg = alg or ("RS256" if key.key_type == "RSA" else "ES256")
        return jwt.encode({"alg": alg, "kid": kid or key.kid}, self.claims(**changes), key, algorithms=[alg])


@contextmanager
def issuer(port: int = 0, keys: list[Key] | None = None) -> Iterator[Issuer]:
    """A provider that runs as long as the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            running.asked.append(self.path)
            content = running.document(self.path)
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    running = Issuer(f"http://127.0.0.1:{server.server_address[1]}", keys or [ec_key("first")])
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield running
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
