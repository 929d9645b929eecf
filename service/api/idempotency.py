"""The header `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header), read and enforced."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

from anyio import CancelScope
from fastapi import Depends, Header, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import Engine as Database

from pdtrim.contract.errors import InvalidIdempotencyKey
from service.db import idempotency
from service.db.idempotency import Answered, KeyClaim
from service.db.session import transaction

HEADER = "Idempotency-Key"
REPLAYED = "Idempotency-Replayed"
# The draft has a quoted string; much software sends it bare.
BARE = "[A-Za-z0-9._:~+/=-]{1,128}"
KEY = re.compile(rf'("?)({BARE})\1')
REPLAYED_HEADER: dict[str, Any] = {
    REPLAYED: {
        "description": "`true` where the answer repeats that of an earlier request with the same key.",
        "schema": {"type": "string"},
    }
}


async def _key(
    request: Request,
    given: Annotated[
        str | SkipJsonSchema[None],
        Header(
            alias=HEADER,
            description="Makes sending again safe: the same key with the same body gives the same job for 24 h. "
            "1 to 128 letters, digits and `._:~+/=-`, in double quotes or bare. A refused request frees its key.",
            examples=['"0198a3f2-5e0e-7c52-b3a0-d1f3b6a4c7de"'],
            json_schema_extra={"pattern": f'^({BARE}|"{BARE}")$'},
        ),
    ] = None,
) -> str | None:
    sent = request.headers.getlist(HEADER)
    if given is None or not sent:
        return None
    found = KEY.fullmatch(sent[0].strip())
    if len(sent) > 1 or found is None:
        raise InvalidIdempotencyKey(
            "Send one Idempotency-Key of 1 to 128 letters, digits and ._:~+/=- in double quotes or bare.", param=HEADER
        )
    return found[2]


IdempotencyKey = Annotated[str | None, Depends(_key)]


def fingerprint(body: BaseModel, cut_from: str | None = None) -> str:
    """SHA-256 of what a body says, whatever its order and spacing, and of the job that it is about, if it is."""
    said = body.model_dump(mode="json", exclude_unset=True)
    if cut_from is not None:
        said = {"cut_from": cut_from, "body": said}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


@asynccontextmanager
async def claimed(
    database: Database, project: str, key: str | None, said: Callable[[], str]
) -> AsyncIterator[KeyClaim | Answered | None]:
    """The right to create a job under `key`, or the answer given before; None without a key.

    `said` gives the body's fingerprint, which takes a while. A block that raises, or is dropped, frees the key.

    Raises: IdempotencyKeyReused, RequestInFlight.
    """
    if key is None:
        yield None
        return
    found = await run_in_threadpool(_claim, database, project, key, said)
    try:
        yield found
    except BaseException:
        if isinstance(found, KeyClaim):
            with CancelScope(shield=True):  # A client that has left may send again.
                await run_in_threadpool(_release, database, found)
        raise


def _claim(database: Database, project: str, key: str, said: Callable[[], str]) -> KeyClaim | Answered:
    found = said()
    with transaction(database) as session:
        return idempotency.claim(session, project, key, found)


def _release(database: Database, claim: KeyClaim) -> None:
    with transaction(database) as session:
        idempotency.release(session, claim)
