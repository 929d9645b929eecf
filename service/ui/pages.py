"""Pages and their headers; every error of a path under /ui as a page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from pdtrim.contract.access import Scope
from pdtrim.display import captions
from pdtrim.display.quantities import size
from service.api.auth import Caller, Refused
from service.api.problems import problem
from service.api.sessions import COOKIE, Session, Sessions, is_https
from service.ui.visits import CameFromElsewhere, LoginNeeded

STATIC = Path(__file__).parent / "static"
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
HOME = "/ui/jobs"
OURS = re.compile(r"/ui/[A-Za-z0-9_./?=&%-]*")
"""Where a login may lead."""


def render(
    request: Request, template: str, *, status: int = 200, headers: Mapping[str, str] | None = None, **content: Any
) -> Response:
    """A page; a visitor's first one starts their session."""
    session: Session | None = getattr(request.state, "session", None)
    caller: Caller | None = getattr(request.state, "caller", None)
    text = PAGES.get_template(template).render(
        **content,
        csrf="" if session is None else session.csrf,
        caller=caller,
        may_change=caller is not None and caller.may(Scope.SUBMIT),
        logged_in=caller is not None and session is not None and bool(session.token),
    )
    response = HTMLResponse(text, status_code=status, headers={**(headers or {}), **HEADERS})
    new: Session | None = getattr(request.state, "new_session", None)
    if new is not None:
        keep(request, response, new)
    return response


def keep(request: Request, response: Response, session: Session) -> None:
    """Have the browser keep a session."""
    sessions: Sessions = request.app.state.sessions
    sessions.write(response, session, secure=is_https(request.url.scheme, request.headers))


def go(path: str) -> Response:
    """Send the browser on after a form was taken."""
    return RedirectResponse(path, status_code=303, headers=HEADERS)


def local(path: str) -> str:
    """The path, if it is one of ours; else the first page."""
    return path if OURS.fullmatch(path) else HOME


def install(app: FastAPI) -> None:
    """Serve style and script, and answer errors under /ui with pages."""
    app.mount("/ui/static", StaticFiles(directory=STATIC), name="static")
    for error, handler in list(app.exception_handlers.items()):
        if not iscoroutinefunction(handler):
            app.exception_handler(error)(_as_page(handler))
    app.exception_handler(Refused)(_as_page(_from_refused))
    app.exception_handler(LoginNeeded)(_to_login)
    app.exception_handler(CameFromElsewhere)(_come_again)


def _as_page(handler: Callable[..., Any]) -> Callable[[Request, Exception], Response]:
    def handle(request: Request, error: Exception) -> Response:
        answer: Response = handler(request, error)
        if not f"{request.scope['path']}/".startswith("/ui/"):
            return answer
        kept = {name: value for name, value in answer.headers.items() if name in ("allow", "retry-after")}
        return render(
            request, "error.html", status=answer.status_code, headers=kept, problem=json.loads(bytes(answer.body))
        )

    return handle


def _from_refused(request: Request, error: Refused) -> Response:
    return problem(request, error.error, headers=error.headers)


def _to_login(request: Request, error: Exception) -> Response:
    path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    wanted = path if request.method == "GET" else HOME
    response = go("/ui/login" + ("" if wanted == HOME else f"?next={quote(wanted)}"))
    session: Session = request.state.session
    if session.token:
        response.delete_cookie(COOKIE, path="/")
    return response


def _come_again(request: Request, error: Exception) -> Response:
    return render(request, "come_again.html", path=local(request.url.path))


def _code(text: str) -> Markup:
    """Text with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _moment(moment: datetime | None) -> Markup | str:
    """A time to the second, in UTC."""
    if moment is None:
        return "–"
    utc = moment.astimezone(UTC)
    return Markup('<time datetime="{}">{}</time>').format(
        utc.isoformat(timespec="seconds"), utc.strftime("%Y-%m-%d %H:%M:%S UTC")
    )


PAGES = Environment(
    loader=PackageLoader("service.ui"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGES.globals["captions"] = captions
PAGES.filters |= {"code": _code, "moment": _moment, "size": size}
