"""The client's requests about webhooks: `client.webhooks`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from pdtrim.client.core import Sender, given, said
from pdtrim.contract.jobs import Page
from pdtrim.contract.webhooks import Delivery, DeliveryStatus, NewSecret, Webhook, WebhookChange, WebhookSpec

PATH = "/v1/webhooks"


class WebhookCalls:
    """Webhooks of the key's project. Methods raise what those of the client raise."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    async def create(self, spec: WebhookSpec | Mapping[str, Any]) -> NewSecret:
        """Create a webhook; only this answer and that of `rotate_secret` have the signing secret."""
        return await self._sender.fetch(NewSecret, "POST", PATH, json=said(spec))

    async def page(self, *, limit: int = 20, after: str | None = None) -> Page[Webhook]:
        """A page of webhooks, newest first."""
        return await self._sender.fetch(Page[Webhook], "GET", PATH, params=given(limit=limit, after=after))

    async def get(self, webhook_id: str) -> Webhook:
        """The webhook as it is now."""
        return await self._sender.fetch(Webhook, "GET", _path(webhook_id))

    async def update(self, webhook_id: str, change: WebhookChange | Mapping[str, Any]) -> Webhook:
        """Change what is given."""
        return await self._sender.fetch(Webhook, "PATCH", _path(webhook_id), json=said(change))

    async def delete(self, webhook_id: str) -> None:
        """Delete a webhook with its deliveries."""
        await self._sender.ask("DELETE", _path(webhook_id))

    async def rotate_secret(self, webhook_id: str) -> NewSecret:
        """Make a new secret; the one before signs beside it for a day."""
        return await self._sender.fetch(NewSecret, "POST", f"{_path(webhook_id)}/rotate-secret")

    async def test(self, webhook_id: str) -> Delivery:
        """Have a test message sent."""
        return await self._sender.fetch(Delivery, "POST", f"{_path(webhook_id)}/test")

    async def deliveries(
        self, webhook_id: str, *, limit: int = 20, after: str | None = None, status: DeliveryStatus | None = None
    ) -> Page[Delivery]:
        """A page of deliveries with their attempts, newest first."""
        params = given(limit=limit, after=after, status=status)
        return await self._sender.fetch(Page[Delivery], "GET", f"{_path(webhook_id)}/deliveries", params=params)

    async def resend(self, webhook_id: str, delivery_id: str) -> Delivery:
        """Have a message sent again."""
        return await self._sender.fetch(
            Delivery, "POST", f"{_path(webhook_id)}/deliveries/{quote(delivery_id, safe='')}/resend"
        )


def _path(webhook_id: str) -> str:
    return f"{PATH}/{quote(webhook_id, safe='')}"
