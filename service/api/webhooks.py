"""Webhooks: create, list, look at, change, delete, rotate the secret, try out; their deliveries, and sending again."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Depends, Query, Response

from pdtrim.contract.errors import (
    CursorNotFound,
    DeliveryNotFound,
    DependencyUnavailable,
    InvalidRequest,
    MissingScope,
    TooManyWebhooks,
    Unauthorized,
    UrlNotAllowed,
    WebhookDisabled,
    WebhookNotFound,
)
from pdtrim.contract.jobs import Page
from pdtrim.contract.webhooks import (
    Delivery,
    DeliveryStatus,
    NewSecret,
    Webhook,
    WebhookChange,
    WebhookMessage,
    WebhookSpec,
)
from service.api import examples
from service.api.auth import declared
from service.api.deps import (
    AfterDelivery,
    AfterWebhook,
    DatabaseDep,
    DeliveryId,
    Limit,
    Project,
    SettingsDep,
    WebhookId,
    json_only,
)
from service.api.problems import BodyTooLarge, MalformedBody, UnsupportedMediaType, documented
from service.api.suggestions import only_known_parameters
from service.db import deliveries, views, webhooks
from service.db.session import transaction
from service.settings import Settings
from service.upkeep import webhooks as messages
from service.upkeep.outbound import NotAllowed, check_url

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"], dependencies=[declared, only_known_parameters])
outgoing = APIRouter()
"""What the service sends to webhooks, for the OpenAPI document: a callback of the request that makes one. Generators of
clients make a method, and wrong code, of what stands in the document's own section of webhooks."""

REFUSED_BODIES = (MalformedBody, BodyTooLarge, UnsupportedMediaType, InvalidRequest, UrlNotAllowed)
REFUSED = (Unauthorized, MissingScope, WebhookNotFound, DependencyUnavailable)


@outgoing.post(
    "{$request.body#/url}",
    tags=["webhooks"],
    summary="An event, sent to a webhook",
    operation_id="receive_message",
    status_code=204,
    responses={
        204: {"description": "Taken, as is any answer of 200 to 299."},
        410: {"description": "Send nothing more: the webhook is disabled. After anything else the message is retried."},
    },
)
def receive_message(message: WebhookMessage) -> None:
    """Signed with the headers `webhook-id`, `webhook-timestamp` and `webhook-signature` (standardwebhooks.com)."""


@router.post(
    "",
    status_code=201,
    summary="Create a webhook",
    operation_id="create_webhook",
    callbacks=outgoing.routes,
    response_model=NewSecret,
    dependencies=[Depends(json_only)],
    responses={
        201: {
            **examples.response(examples.NEW_SECRET, "The webhook with its secret, which is shown this once."),
            "headers": {"Location": {"description": "Path of the webhook.", "schema": {"type": "string"}}},
        },
        **documented(Unauthorized, MissingScope, TooManyWebhooks, DependencyUnavailable, *REFUSED_BODIES),
    },
)
def create_webhook(
    spec: Annotated[WebhookSpec, Body(openapi_examples=examples.WEBHOOK_REQUESTS)],
    response: Response,
    settings: SettingsDep,
    database: DatabaseDep,
    project: Project,
) -> NewSecret:
    """Have events of the project's jobs sent to a URL, signed as Standard Webhooks has it."""
    checked = spec.model_copy(update={"url": _allowed(spec.url, settings)})
    with transaction(database) as session:
        created = NewSecret.model_validate(webhooks.create(session, checked, project=project))
    response.headers.update({"Location": f"/v1/webhooks/{created.id}", "Cache-Control": "no-store"})
    return created


@router.get(
    "",
    summary="List webhooks",
    operation_id="list_webhooks",
    response_model=Page[Webhook],
    responses={
        200: examples.response(examples.WEBHOOKS, "A page of webhooks, newest first."),
        **documented(Unauthorized, MissingScope, InvalidRequest, CursorNotFound, DependencyUnavailable),
    },
)
def list_webhooks(database: DatabaseDep, project: Project, after: AfterWebhook, limit: Limit = 20) -> Page[Webhook]:
    """Newest first. Read on with `after` set to the page's `last_id` while `has_more` is true."""
    with transaction(database) as session:
        return views.webhooks(*webhooks.page(session, project, limit=limit, after=after))


@router.get(
    "/{webhook_id}",
    summary="Look at a webhook",
    operation_id="get_webhook",
    response_model=Webhook,
    responses={200: examples.response(examples.WEBHOOK, "The webhook, without its secret."), **documented(*REFUSED)},
)
def get_webhook(webhook_id: WebhookId, database: DatabaseDep) -> Webhook:
    """Where it sends what, and whether it works."""
    with transaction(database) as session:
        return Webhook.model_validate(webhooks.get(session, webhook_id))


@router.patch(
    "/{webhook_id}",
    summary="Change a webhook",
    operation_id="update_webhook",
    response_model=Webhook,
    dependencies=[Depends(json_only)],
    responses={
        200: examples.response(examples.WEBHOOK, "The webhook as it is now."),
        **documented(*REFUSED, *REFUSED_BODIES),
    },
)
def update_webhook(
    webhook_id: WebhookId,
    change: Annotated[WebhookChange, Body(openapi_examples=examples.WEBHOOK_CHANGES)],
    settings: SettingsDep,
    database: DatabaseDep,
) -> Webhook:
    """Change what the body names: URL, events, description, format, or whether it is enabled.

    Events that happen while it is disabled are not sent later; what was waiting then is, if it is enabled in time.
    """
    if change.url is not None:
        change = change.model_copy(update={"url": _allowed(change.url, settings)})
    with transaction(database) as session:
        return Webhook.model_validate(webhooks.change(session, webhook_id, change))


@router.delete(
    "/{webhook_id}",
    status_code=204,
    summary="Delete a webhook",
    operation_id="delete_webhook",
    response_class=Response,
    responses={204: {"description": "The webhook is gone, with its deliveries."}, **documented(*REFUSED)},
)
def delete_webhook(webhook_id: WebhookId, database: DatabaseDep) -> None:
    """Delete a webhook; what waits to be sent to it never is."""
    with transaction(database) as session:
        webhooks.delete(session, webhook_id)


@router.post(
    "/{webhook_id}/rotate-secret",
    summary="Rotate a webhook's secret",
    operation_id="rotate_webhook_secret",
    response_model=NewSecret,
    responses={
        200: examples.response(examples.NEW_SECRET, "The webhook with its new secret, which is shown this once."),
        **documented(*REFUSED),
    },
)
def rotate_webhook_secret(webhook_id: WebhookId, response: Response, database: DatabaseDep) -> NewSecret:
    """Make a new secret. For a day messages are signed with the one before, too, so that receivers can change over."""
    response.headers["Cache-Control"] = "no-store"
    with transaction(database) as session:
        return NewSecret.model_validate(webhooks.rotate(session, webhook_id))


@router.post(
    "/{webhook_id}/test",
    status_code=202,
    summary="Try a webhook out",
    operation_id="test_webhook",
    response_model=Delivery,
    responses={
        202: examples.response(
            {**examples.WAITING_DELIVERY, "type": "webhook.test", "job_id": None}, "The test, to be sent in seconds."
        ),
        **documented(*REFUSED, WebhookDisabled),
    },
)
def test_webhook(webhook_id: WebhookId, database: DatabaseDep) -> Delivery:
    """Send a message of type `webhook.test`, once. What came of it is in the webhook's deliveries."""
    with transaction(database) as session:
        return Delivery.model_validate(deliveries.try_out(session, webhook_id))


@router.get(
    "/{webhook_id}/deliveries",
    summary="List a webhook's deliveries",
    operation_id="list_deliveries",
    response_model=Page[Delivery],
    responses={
        200: examples.response(examples.DELIVERIES, "A page of deliveries, newest first."),
        **documented(*REFUSED, InvalidRequest, CursorNotFound),
    },
)
def list_deliveries(
    webhook_id: WebhookId,
    database: DatabaseDep,
    after: AfterDelivery,
    limit: Limit = 20,
    status: Annotated[DeliveryStatus | None, Query(description="Only deliveries in this state.")] = None,
) -> Page[Delivery]:
    """Messages of the last 30 days with the attempts to deliver them, newest first."""
    with transaction(database) as session:
        return views.deliveries(*deliveries.page(session, webhook_id, limit=limit, after=after, status=status))


@router.post(
    "/{webhook_id}/deliveries/{delivery_id}/resend",
    status_code=202,
    summary="Send a message again",
    operation_id="resend_delivery",
    response_model=Delivery,
    responses={
        202: examples.response(examples.WAITING_DELIVERY, "The delivery, to be sent in seconds."),
        **documented(*REFUSED, DeliveryNotFound, WebhookDisabled),
    },
)
def resend_delivery(webhook_id: WebhookId, delivery_id: DeliveryId, database: DatabaseDep) -> Delivery:
    """Send a message again, delivered or not, under the same `webhook-id` and with all its attempts before it."""
    with transaction(database) as session:
        return Delivery.model_validate(deliveries.resend(session, webhook_id, delivery_id))


def _allowed(url: str, settings: Settings) -> str:
    try:
        return str(check_url(url, messages.policy(settings)))
    except NotAllowed as error:
        raise UrlNotAllowed(f"Messages cannot go to this URL: {error}.", param="url") from error
