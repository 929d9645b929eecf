"""`pdtrim webhooks`: have events sent to a URL, and see what arrived there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from pdtrim.client.transports import DEFAULT_URL
from pdtrim.command.connection import Json, Key, Url, connected, console, print_json
from pdtrim.contract.webhooks import Delivery, DeliveryStatus, MessageFormat, Webhook, WebhookEvent
from pdtrim.display.jobs import when

app = typer.Typer(
    name="webhooks",
    help="Have events of jobs sent to a URL, signed as Standard Webhooks has it.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
ENDS = [WebhookEvent.JOB_SUCCEEDED, WebhookEvent.JOB_FAILED, WebhookEvent.JOB_CANCELLED]
WebhookId = Annotated[str, typer.Argument(help="The webhook's id, as `list` prints it.", metavar="WEBHOOK")]
DeliveryId = Annotated[str, typer.Argument(help="The delivery's id, as `deliveries` prints it.", metavar="DELIVERY")]
Limit = Annotated[int, typer.Option(min=1, max=100, help="How many, newest first.")]


def create(
    target: Annotated[str, typer.Argument(help="Where messages are sent.", metavar="TARGET")],
    event: Annotated[
        list[WebhookEvent] | None,
        typer.Option("--event", help="What to announce; may be repeated.", show_default="every end of a job"),
    ] = None,
    description: Annotated[str, typer.Option(help="For those who list webhooks.")] = "",
    format_: Annotated[MessageFormat, typer.Option("--format", help="How messages are written.")] = (
        MessageFormat.STANDARD
    ),
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Create a webhook and print its id and signing secret: the secret this once.

    Example: `pdtrim webhooks create https://ci.example.com/pdtrim --event job.succeeded --event job.failed`
    """
    spec = {"url": target, "events": event or ENDS, "description": description, "format": format_}
    with connected(url, api_key) as client:
        created = client.webhooks.create(spec)
    if as_json:
        print_json(created)
    else:
        console.print(f"{created.id}\n{created.secret}", markup=False, highlight=False, soft_wrap=True)


def list_(limit: Limit = 20, url: Url = DEFAULT_URL, api_key: Key = None, as_json: Json = False) -> None:
    """List the project's webhooks, without their secrets.

    Example: `pdtrim webhooks list`
    """
    with connected(url, api_key) as client:
        page = client.webhooks.page(limit=limit)
    if as_json:
        print_json(page)
        return
    table = Table(box=None, header_style="bold")
    table.add_column("webhook", no_wrap=True)
    for column in ("state", "target", "events", "description"):
        table.add_column(column, overflow="fold")
    for hook in page.data:
        table.add_row(hook.id, _state(hook), Text(hook.url), ", ".join(hook.events), Text(hook.description))
    console.print(table)


def _state(hook: Webhook) -> str:
    if not hook.enabled:
        return f"disabled ({hook.disabled_reason})"
    return "enabled" if hook.failing_since is None else f"failing since {when(hook.failing_since)}"


def enable(webhook: WebhookId, url: Url = DEFAULT_URL, api_key: Key = None, as_json: Json = False) -> None:
    """Let a disabled webhook send again. Events that happened meanwhile are not sent.

    Example: `pdtrim webhooks enable wh_0198a3f1c2d47a90b1e2f3a4b5c6d7e8`
    """
    with connected(url, api_key) as client:
        enabled = client.webhooks.update(webhook, {"enabled": True})
    if as_json:
        print_json(enabled)
    else:
        console.print(f"{enabled.id} is enabled.", highlight=False)


def delete(webhook: WebhookId, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Delete a webhook with its deliveries.

    Example: `pdtrim webhooks delete wh_0198a3f1c2d47a90b1e2f3a4b5c6d7e8`
    """
    with connected(url, api_key) as client:
        client.webhooks.delete(webhook)
    console.print(f"{webhook} is deleted.", markup=False, highlight=False)


def try_out(webhook: WebhookId, url: Url = DEFAULT_URL, api_key: Key = None, as_json: Json = False) -> None:
    """Send a test message; `deliveries` then shows what came of it.

    Example: `pdtrim webhooks test wh_0198a3f1c2d47a90b1e2f3a4b5c6d7e8`
    """
    with connected(url, api_key) as client:
        _print_delivery(client.webhooks.test(webhook), as_json)


def deliveries(
    webhook: WebhookId,
    status: Annotated[DeliveryStatus | None, typer.Option(help="Only deliveries in this state.")] = None,
    limit: Limit = 20,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """List a webhook's deliveries of the last 30 days. --json has every attempt.

    Example: `pdtrim webhooks deliveries wh_0198a3f1c2d47a90b1e2f3a4b5c6d7e8 --status failed`
    """
    with connected(url, api_key) as client:
        page = client.webhooks.deliveries(webhook, limit=limit, status=status)
    if as_json:
        print_json(page)
        return
    table = Table(box=None, header_style="bold")
    table.add_column("delivery", no_wrap=True)
    for column in ("event", "created", "status", "attempts", "answer", "next attempt"):
        table.add_column(column, overflow="fold")
    for one in page.data:
        last = one.attempts[-1] if one.attempts else None
        answer = "" if last is None else last.error or str(last.response_code)
        following = "" if one.next_attempt_at is None else when(one.next_attempt_at)
        number = "" if last is None else str(last.number)
        table.add_row(one.id, one.type, when(one.created_at), one.status, number, Text(answer), following)
    console.print(table)


def resend(
    webhook: WebhookId, delivery: DeliveryId, url: Url = DEFAULT_URL, api_key: Key = None, as_json: Json = False
) -> None:
    """Send a message again, with all its attempts before it.

    Example: `pdtrim webhooks resend wh_0198a3f1c2d47a90b1e2f3a4b5c6d7e8 msg_0198a3f6b7c87d12a3b4c5d6e7f80912`
    """
    with connected(url, api_key) as client:
        _print_delivery(client.webhooks.resend(webhook, delivery), as_json)


def _print_delivery(delivery: Delivery, as_json: bool) -> None:
    if as_json:
        print_json(delivery)
    else:
        console.print(f"{delivery.id} will be sent in seconds.", highlight=False)


COMMANDS: dict[str, Callable[..., None]] = {
    "create": create,
    "list": list_,
    "enable": enable,
    "delete": delete,
    "test": try_out,
    "deliveries": deliveries,
    "resend": resend,
}
for command_name, command in COMMANDS.items():
    app.command(command_name)(command)
