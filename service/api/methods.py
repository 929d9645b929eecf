"""The pruning methods on offer."""

from __future__ import annotations

from fastapi import APIRouter

from pdtrim.contract.errors import MissingScope, Unauthorized
from pdtrim.contract.jobs import Page
from pdtrim.contract.methods import Method, methods
from service.api.auth import declared
from service.api.problems import documented
from service.api.suggestions import only_known_parameters

router = APIRouter(prefix="/v1/methods", tags=["methods"], dependencies=[declared, only_known_parameters])


@router.get(
    "",
    summary="List pruning methods",
    operation_id="list_methods",
    response_model=Page[Method],
    responses=documented(Unauthorized, MissingScope),
)
def list_methods() -> Page[Method]:
    """Each method with a summary, its source, and its parameters as JSON Schema."""
    found = methods()
    return Page[Method](data=found, has_more=False, first_id=found[0].name, last_id=found[-1].name)
