"""Login by key, and logout."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from pdtrim.contract.errors import Unauthorized
from service.api.auth import Refused
from service.api.deps import DatabaseDep
from service.api.sessions import COOKIE, MAX_TOKEN_BYTES, Session
from service.ui.pages import HOME, go, keep, local, render
from service.ui.visits import Posted, SessionDep, enter

router = APIRouter(prefix="/ui", include_in_schema=False)

WRONG = "This key does not open. Check that it is whole, and that it is neither revoked nor expired."
LONG = f"A key has at most {MAX_TOKEN_BYTES} bytes."


@router.get("/login")
def show(request: Request, session: SessionDep, next: Annotated[str, Query(max_length=1000)] = HOME) -> Response:
    """The form that asks for a key; where the service runs without keys, on to the jobs."""
    return render(request, "login.html", next=local(next), error=None)


@router.post("/login")
def login(request: Request, session: SessionDep, database: DatabaseDep, form: Posted) -> Response:
    """Start a session with the key, if it opens."""
    wanted = local(form.get("next", HOME))
    # As it comes in a header: its bytes, decoded as Latin-1.
    token = form.get("key", "").strip().encode("utf-8", "replace").decode("latin-1")
    if len(token) > MAX_TOKEN_BYTES:
        return render(request, "login.html", status=422, next=wanted, error=LONG)
    try:
        enter(request, database, token, method="GET")
    except Refused as refused:
        error = WRONG if isinstance(refused.error, Unauthorized) else refused.error.message
        return render(request, "login.html", status=refused.error.status, next=wanted, error=error)
    response = go(wanted)
    keep(request, response, Session(token))
    return response


@router.post("/logout")
def logout(form: Posted) -> Response:
    """Forget the key."""
    response = go("/ui/login")
    response.delete_cookie(COOKIE, path="/")
    return response
