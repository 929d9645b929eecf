"""The Python client's part about webhooks: `client.webhooks`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel

from service.contract.jobs import Page
from service.contract.webhooks import Delivery, DeliveryStatus, NewSecret, Webhook, WebhookChange, WebhookSpec

Answer = TypeVar("Answer", bound=BaseModel)
PATH = "/v1/webhooks"


class Fetch(Protocol):
    """Asks the service, and reads its answer as a model."""

    def __call__(self, kind: type[Answer], method: str, url: str, **request: Any) -> Answer: ...


class Ask(Protocol):
    """Asks the service."""

    def __call__(self, method: str, url: str, **request: Any) -> httpx.Response: ...


class Webhooks:
    """Webhooks of the key's project. Methods raise what those of the client raise."""

    def __init__(self, fetch: Fetch, ask: Ask) -> None:
        self._fetch, self._ask = fetch, ask

    def create(self, spec: WebhookSpec | Mapping[str, Any]) -> NewSecret:
        """Create a webhook; only this answer and that of `rotate_secret` have the signing secret."""
        return self._fetch(NewSecret, "POST", PATH, json=_body(spec))

    def page(self, *, limit: int = 20, after: str | None = None) -> Page[Webhook]:
        """A page of webhooks, newest first."""
        return self._fetch(Page[Webhook], "GET", PATH, params=_given(limit=limit, after=after))

    def get(self, webhook_id: str) -> Webhook:
        """The webhook as it is now."""
        return self._fetch(Webhook, "GET", _path(webhook_id))

    def update(self, webhook_id: str, change: WebhookChange | Mapping[str, Any]) -> Webhook:
        """Change what is given."""
        return self._fetch(Webhook, "PATCH", _path(webhook_id), json=_body(change))

    def delete(self, webhook_id: str) -> None:
        """Delete a webhook with its deliveries."""
        self._ask("DELETE", _path(webhook_id))

    def rotate_secret(self, webhook_id: str) -> NewSecret:
        """Make a new secret; the one before signs beside it for a day."""
        return self._fetch(NewSecret, "POST", f"{_path(webhook_id)}/rotate-secret")

    def test(self, webhook_id: str) -> Delivery:
        """Have a test message sent."""
        return self._fetch(Delivery, "POST", f"{_path(webhook_id)}/test")

    def deliveries(
        self, webhook_id: str, *, limit: int = 20, after: str | None = None, status: DeliveryStatus | None = None
    ) -> Page[Delivery]:
        """A page of deliveries with their attempts, newest first."""
        params = _given(limit=limit, after=after, status=status)
        return self._fetch(Page[Delivery], "GET", f"{_path(webhook_id)}/deliveries", params=params)

    def resend(self, webhook_id: str, delivery_id: str) -> Delivery:
        """Have a message sent again."""
        return self._fetch(Delivery, "POST", f"{_path(webhook_id)}/deliveries/{quote(delivery_id, safe='')}/resend")


def _path(webhook_id: str) -> str:
    return f"{PATH}/{quote(webhook_id, safe='')}"


def _body(said: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    return said.model_dump(mode="json", exclude_unset=True) if isinstance(said, BaseModel) else dict(said)


def _given(**params: Any) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}
