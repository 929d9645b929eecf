"""What Schemathesis cannot know: which answers to requests that its document allows are right nevertheless."""

from __future__ import annotations

from typing import Any

import schemathesis
from schemathesis.core.failures import Failure
from schemathesis.core.transport import Response
from schemathesis.openapi.checks import RejectedPositiveData
from schemathesis.schemas import APIOperation

Case = schemathesis.Case[APIOperation[Any, Any, Any, Any]]
TAKE_SPECIFICATIONS = ("create_job", "estimate_job", "create_export")


@schemathesis.hook
def filter_failure(
    context: schemathesis.HookContext,
    failure: Failure,
    case: schemathesis.Case[APIOperation[Any, Any, Any, Any]],
    response: Response,
) -> bool:
    """Keep a failure, unless it is a refusal for what no JSON Schema says.

    That is: a cursor or a model that is not there, and rules that bind several fields of a job to one another.
    """
    if not isinstance(failure, RejectedPositiveData) or response.status_code != 422:
        return True
    refused = response.json()["code"] == "invalid_request"
    return refused and case.operation.definition.raw["operationId"] not in TAKE_SPECIFICATIONS
