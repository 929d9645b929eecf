"""Every error as an RFC 9457 problem: on the wire, and in the OpenAPI document."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from http import HTTPStatus
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from pdtrim.contract.errors import (
    ArtifactNotFound,
    ArtifactQuotaExceeded,
    DependencyUnavailable,
    InvalidRequest,
    MissingProject,
    MissingScope,
    PDTrimError,
    Problem,
    QueueQuotaExceeded,
    RateLimited,
    Refusal,
    RequestInFlight,
    Unauthorized,
)
from service.api import suggestions
from service.db.session import DATABASE_FAULTS
from service.observing.redaction import redact, scrub
from service.storage import ObjectNotFound, StoreUnavailable

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
MAX_TOLD_ERRORS = 5
"""In the detail of a problem."""
MAX_LISTED_ERRORS = 50
"""Each by itself."""
MAX_ECHO = 80
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# A queue moves on within a minute, if at all; bytes are there until somebody deletes them.
HEADERS = {
    Unauthorized: {"WWW-Authenticate": "Bearer"},
    RequestInFlight: {"Retry-After": "1"},
    DependencyUnavailable: {"Retry-After": "5"},
    QueueQuotaExceeded: {"Retry-After": "60"},
    ArtifactQuotaExceeded: {"Retry-After": "3600"},
}
RATE_HEADERS = {
    "Retry-After": "Seconds after which it is worth trying again.",
    "RateLimit-Policy": "The limit: its name, `q` requests in `w` seconds (draft-ietf-httpapi-ratelimit-headers).",
    "RateLimit": "What is left of it: `r` requests, and `t` seconds until there are more. Other answers have both.",
}


class NotFound(PDTrimError):
    code, title, status = "not_found", "No such resource", 404


class MethodNotAllowed(PDTrimError):
    code, title, status = "method_not_allowed", "The method is not allowed here", 405


class MalformedBody(PDTrimError):
    code, title, status = "malformed_body", "The request body is not valid JSON", 400


class BodyTooLarge(PDTrimError):
    code, title, status = "body_too_large", "The request body is too large", 413


class UnsupportedMediaType(PDTrimError):
    code, title, status = "unsupported_media_type", "The request body must be JSON", 415


class InternalError(PDTrimError):
    """Something broke that the client can do nothing about; the details are in the gateway's log."""

    code, title, status = "internal_error", "Internal error", 500

    DETAIL: ClassVar[str] = "The gateway failed to answer. Its log has the details under this request id."


def _scalar(text: str) -> str:
    """The text without what UTF-8 cannot carry (lone surrogates from JSON escapes)."""
    return text.encode("utf-8", "replace").decode()


def problem(
    request: Request,
    error: PDTrimError,
    *,
    headers: Mapping[str, str] | None = None,
    extensions: Mapping[str, Any] | None = None,
    found: Sequence[PDTrimError] = (),
) -> Response:
    """The problem response of an error, without secrets.

    `extensions` are further members of the problem object; `found` is all that is wrong, where more was looked for.
    """
    body = Problem(
        type=f"urn:pdtrim:problem:{error.code}",
        title=error.title,
        status=error.status,
        detail=redact(_scalar(error.message)),
        instance=redact(_scalar(request.scope["path"])),
        code=error.code,
        param=None if error.param is None else redact(_scalar(error.param)),
        request_id=getattr(request.state, "request_id", None),
        errors=[_refusal(one) for one in found[:MAX_LISTED_ERRORS]] if len(found) > 1 else None,
    )
    content = json.dumps({**body.model_dump(mode="json", exclude_none=True), **scrub(extensions or {})})
    return Response(content, status_code=error.status, media_type=MEDIA_TYPE, headers=headers)


def _refusal(error: PDTrimError) -> Refusal:
    param = None if error.param is None else redact(_scalar(error.param))
    return Refusal(code=error.code, detail=redact(_scalar(error.message)), param=param)


def dotted(location: Sequence[str | int]) -> str | None:
    """A validation error's location as the field's dotted path, without the part of the request it is in."""
    # Parameters are flat but for metadata[key]: what follows a name is the member of a union that was tried.
    deep = location[0] == "body" or location[1:2] == ("metadata",)
    inside = location[1:] if deep else location[1:2]
    path = [str(part) for part in inside if part != "[key]"]
    return ".".join(path) or None


def field_and_reason(error: Mapping[str, Any]) -> tuple[str | None, str]:
    """The field that a validation error is about, as a dotted path, and what is wrong with it."""
    field = error.get("ctx", {}).get("param") or dotted(error["loc"])
    reason = str(error["msg"]).removeprefix("Value error, ")
    given = error.get("input")
    if isinstance(given, bool | int | float | str) and len(echo := json.dumps(given)) <= MAX_ECHO:
        reason = f"{reason} (given: {echo})"
    return field, reason


def _from_validation(request: Request, error: RequestValidationError) -> Response:
    found = error.errors()
    if found and found[0]["type"] == "json_invalid":
        reason, position = found[0]["ctx"]["error"], found[0]["loc"][-1]
        return problem(request, MalformedBody(f"The body is not valid JSON: {reason} at character {position}."))
    listed: list[PDTrimError] = []
    for one in found[:MAX_LISTED_ERRORS]:
        field, reason = field_and_reason(suggestions.with_suggestion_for(request, one))
        listed.append(InvalidRequest(reason, param=field))
    told = [f"{one.param}: {one.message}" if one.param else one.message for one in listed[:MAX_TOLD_ERRORS]]
    if len(found) > MAX_TOLD_ERRORS:
        told.append(f"and {len(found) - MAX_TOLD_ERRORS} more errors")
    return problem(request, InvalidRequest("; ".join(told), param=listed[0].param), found=listed)


def _from_http(request: Request, error: HTTPException) -> Response:
    translated: dict[int, PDTrimError] = {
        400: MalformedBody("The body cannot be read as JSON in UTF-8, or it is nested too deeply."),
        404: NotFound("Nothing is at this path. The interface is described at /docs."),
        405: MethodNotAllowed(f"This path does not take {request.method}."),
        413: BodyTooLarge(str(error.detail)),
    }
    if error.status_code not in translated:
        raise TypeError(f"no problem is declared for HTTP status {error.status_code}") from error
    headers = {"Allow": ", ".join(_methods(request))} if error.status_code == 405 else error.headers
    return problem(request, translated[error.status_code], headers=headers)


def _methods(request: Request) -> list[str]:
    """The methods that the request's path takes; the router's own answer names those of one route alone."""
    scopes = {method: {**request.scope, "method": method} for method in METHODS}
    routes = request.app.routes
    return [name for name, scope in scopes.items() if any(route.matches(scope)[0] == Match.FULL for route in routes)]


def _from_pdtrim(request: Request, error: PDTrimError) -> Response:
    return problem(request, error, headers=HEADERS.get(type(error)), found=(error, *error.others))


def database_unavailable(request: Request, error: Exception) -> Response:
    """The problem response while the database does not answer."""
    log.error("database: %s", error)
    unavailable = DependencyUnavailable("The database does not answer. Try again; GET /readyz says what is wrong.")
    return _from_pdtrim(request, unavailable)


def _from_store(request: Request, error: Exception) -> Response:
    log.error("artifact store: %s", error)
    unavailable = DependencyUnavailable("The artifact store does not answer. GET /readyz says what is wrong.")
    return _from_pdtrim(request, unavailable)


def _from_missing_object(request: Request, error: Exception) -> Response:
    log.error("recorded, but not in the artifact store: %s", error)
    return problem(request, ArtifactNotFound("The artifact's file is no longer in the artifact store."))


def install(app: FastAPI) -> None:
    """Answer every error that leaves a route with a problem."""
    app.exception_handler(RequestValidationError)(_from_validation)
    app.exception_handler(HTTPException)(_from_http)
    app.exception_handler(PDTrimError)(_from_pdtrim)
    for error in DATABASE_FAULTS:
        app.exception_handler(error)(database_unavailable)
    app.exception_handler(StoreUnavailable)(_from_store)
    app.exception_handler(ObjectNotFound)(_from_missing_object)


def documented(*errors: type[PDTrimError]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's responses for the errors an operation can answer with, with an example of each code."""
    responses: dict[int | str, dict[str, Any]] = {}
    distinct: set[type[PDTrimError]] = {*errors, InternalError}
    for error in sorted(distinct, key=lambda one: (one.status, one.code)):
        content = {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}
        response = responses.setdefault(
            error.status, {"description": HTTPStatus(error.status).phrase, "content": {MEDIA_TYPE: content}}
        )
        response["content"][MEDIA_TYPE]["examples"][error.code] = {"summary": error.title, "value": _example(error)}
        if error.status == RateLimited.status:
            headers = {name: {"description": said, "schema": {"type": "string"}} for name, said in RATE_HEADERS.items()}
            response["headers"] = headers
    return responses


def _add_access(responses: dict[str, Any]) -> None:
    """Add what `service.api.auth` answers in front of every route."""
    for status, found in documented(
        Unauthorized, MissingScope, MissingProject, RateLimited, DependencyUnavailable
    ).items():
        there = responses.setdefault(str(status), found)
        there["content"][MEDIA_TYPE]["examples"] |= found["content"][MEDIA_TYPE]["examples"]


def _example(error: type[PDTrimError]) -> dict[str, Any]:
    return Problem(
        type=f"urn:pdtrim:problem:{error.code}",
        title=error.title,
        status=error.status,
        detail="What is wrong with this request, and what to do about it.",
        code=error.code,
        request_id="0198a3f25e0e7c52b3a0d1f3b6a4c7de",
    ).model_dump(exclude_none=True)


def _operations(paths: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The operations of some paths, and those that they call back."""
    for operations in paths.values():
        for operation in operations.values():
            yield operation
            for called in operation.get("callbacks", {}).values():
                yield from _operations(called)


def document(app: FastAPI) -> None:
    """Make the app's OpenAPI document say what `install` does: problems in place of FastAPI's validation errors."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        schema = generate()
        schemas = schema["components"]["schemas"]
        found = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= {**found.pop("$defs"), "Problem": found}
        for name, one in schemas.items():
            # Generators of clients name classes by titles, and leave out what has the title of another.
            one["title"] = name.replace("-", "")
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for path, operations in schema["paths"].items():
            for operation in operations.values() if path.startswith("/v1/") else ():
                _add_access(operation["responses"])
        for operation in _operations(schema["paths"]):
            if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                del operation["responses"]["422"]  # It takes an id alone and answers 404, or is not ours.
        return schema

    app.openapi = cache(openapi)  # type: ignore[method-assign]
