"""Who visits the dashboard: session, login and the CSRF token of forms, as dependencies of its routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated
from urllib.parse import parse_qsl

from fastapi import Depends, Request
from sqlalchemy import Engine as Database

from pdtrim.contract.errors import PDTrimError, Unauthorized
from service.api.auth import Caller, Gate, Refused, address_of
from service.api.deps import DatabaseDep
from service.api.sessions import Session, Sessions

FORM = "application/x-www-form-urlencoded"
MAX_FIELDS = 200


class LoginNeeded(Exception):
    """No session that opens: the visitor has to give a key first."""


class CameFromElsewhere(Exception):
    """A link on another site led here, so the browser kept the cookie back: it will send it when it comes again."""


class StaleForm(PDTrimError):
    code, title, status = "stale_form", "The form is no longer valid", 403


async def _session(request: Request) -> Session:
    sessions: Sessions = request.app.state.sessions
    session = sessions.read(request.headers)
    if session is None:
        if request.headers.get("Sec-Fetch-Site") == "cross-site" and request.method == "GET":
            raise CameFromElsewhere
        session = Session()
        request.state.new_session = session
    request.state.session = session
    return session


SessionDep = Annotated[Session, Depends(_session)]


def enter(request: Request, database: Database, token: str, *, method: str) -> Caller:
    """Let a token in as the HTTP interface would: by the same keys, scopes and rates. Raises: Refused."""
    gate: Gate = request.app.state.gate
    caller, _ = gate.enter(database, token, address=address_of(request.scope), method=method)
    return caller


def entered(request: Request, session: SessionDep, database: DatabaseDep) -> Caller:
    """The caller, also for the dependencies of the HTTP interface. Raises: LoginNeeded, Refused."""
    try:
        caller = enter(request, database, session.token, method=request.method)
    except Refused as refused:
        if isinstance(refused.error, Unauthorized):
            raise LoginNeeded from refused
        raise
    request.state.caller = caller
    return caller


CallerDep = Annotated[Caller, Depends(entered)]


async def _posted(request: Request, session: SessionDep) -> Mapping[str, str]:
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    body = await request.body()
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS) if kind == FORM else []
    except ValueError as error:
        raise StaleForm("The form cannot be read. Load the page again and send it once more.") from error
    form = {name: value.replace("\r\n", "\n") for name, value in pairs}
    if not session.sent(form.pop("csrf", "")):
        raise StaleForm("The form was made in another session. Go back, load the page again and send it once more.")
    return form


Posted = Annotated[Mapping[str, str], Depends(_posted)]
"""The fields of a form, by name; a name's last value counts. Raises: StaleForm without the session's CSRF token."""
