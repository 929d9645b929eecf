"""What a client may have meant by a name that nothing has: query parameters, and fields of a body.

Fields come from the OpenAPI document, which FastAPI makes of the routes; it is asked for errors alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from fastapi import Depends, Request, params
from fastapi.dependencies.utils import get_flat_params
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

ELSEWHERE = (params.Path, params.Header, params.Cookie)
"""Where parameters are that are not in the query, whose own may also be fields of a model."""
UNKNOWN_FIELD = "extra_forbidden"
"""Pydantic's name of the error."""
LONGEST_NAME = 64
"""The time that comparing takes grows with the square of the length, and a client may send a megabyte."""


async def known_parameters(request: Request) -> None:
    """Raises: RequestValidationError for query parameters that the route does not read: each would be a filter that
    filters nothing."""
    if not request.query_params:
        return
    route: APIRoute = request.scope["route"]
    names = {one.alias for one in get_flat_params(route.dependant) if not isinstance(one.field_info, ELSEWHERE)}
    # FastAPI has no parameters with keys of their own; such are declared for the document, and read by hand.
    labels = {one["name"] for one in (route.openapi_extra or {}).get("parameters", ())}
    unknown = [name for name in dict.fromkeys(request.query_params) if not _is_known(name, names, labels)]
    if unknown:
        raise RequestValidationError([_unknown(name, names | labels, labels) for name in unknown])


only_known_parameters = Depends(known_parameters)


def _is_known(name: str, names: set[str], labels: set[str]) -> bool:
    label, bracket, _ = name.partition("[")
    return name in names or (bool(bracket) and label in labels)


def _unknown(name: str, names: set[str], labels: set[str]) -> dict[str, Any]:
    if name in labels:
        hint = f"is given by key, as {name}[team]=serving"
    else:
        hint = f"is no parameter of this path{did_you_mean(name, names) or _all_of(names)}"
    return {"type": "unknown_parameter", "loc": ("query", name), "msg": hint}


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`; did you mean …?` with the name that comes nearest, or nothing where none is near."""
    near = get_close_matches(name.lower(), sorted(names), n=1) if len(name) <= LONGEST_NAME else []
    return f"; did you mean {near[0]}?" if near else ""


def _all_of(names: Iterable[str]) -> str:
    return f"; it has {', '.join(sorted(names))}" if names else "; it has none"


def with_suggestion(
    error: Mapping[str, Any], schema: Mapping[str, Any], document: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The error of a field that there is not (`UNKNOWN_FIELD`); its message names the one that was meant.

    Its location begins below `schema`, which is JSON Schema with references into `document`.
    """
    *path, name = error["loc"]
    near = did_you_mean(str(name), fields_at(path, schema, document))
    return {**error, "msg": f"there is no such field{near}"}


def with_suggestion_for(request: Request, error: Mapping[str, Any]) -> Mapping[str, Any]:
    """An error of a request's body, which says what was meant where it is about a field that there is not."""
    if error["type"] != UNKNOWN_FIELD:
        return error
    content = _operation(request).get("requestBody", {}).get("content", {})
    schema: Mapping[str, Any] = next((one["schema"] for one in content.values()), {})
    told = with_suggestion({**error, "loc": error["loc"][1:]}, schema, request.app.openapi())
    return {**told, "loc": error["loc"]}


def fields_at(path: Sequence[str | int], schema: Mapping[str, Any], document: Mapping[str, Any]) -> set[str]:
    """The names of the fields that an object may have at `path` below a schema."""
    schemas = list(_alternatives(schema, document))
    for part in path:
        schemas = [found for one in schemas for inner in _inside(one, part) for found in _alternatives(inner, document)]
    return {name for one in schemas for name in one.get("properties", ())}


def _operation(request: Request) -> dict[str, Any]:
    """The document's entry of the route that the request came to."""
    path: str = request.scope["route"].path_format
    operation: dict[str, Any] = request.app.openapi()["paths"].get(path, {}).get(request.method.lower(), {})
    return operation


def _alternatives(schema: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The schema with its reference followed, or the members of a union."""
    if "$ref" in schema:
        found: Any = document
        for name in schema["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        yield from _alternatives(found, document)
    elif "anyOf" in schema:
        for one in schema["anyOf"]:
            yield from _alternatives(one, document)
    else:
        yield schema


def _inside(schema: Mapping[str, Any], part: str | int) -> list[Mapping[str, Any]]:
    """What a schema says of one of its members; a name that it does not know is a member of a union that was tried."""
    if isinstance(part, int):
        return [schema["items"]] if "items" in schema else []
    return [schema.get("properties", {}).get(part, schema)]
