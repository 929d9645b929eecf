"""Messages to webhooks: written, signed as Standard Webhooks has it (standardwebhooks.com), and sent once.

What is to be sent, and what came of it, is the outbox's affair (`db.deliveries`).
"""

from __future__ import annotations

import json
import logging
import random
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from time import monotonic
from typing import Any

from standardwebhooks import Webhook

from pdtrim.contract.webhooks import TEST_EVENT, DeliveryAttempt, MessageFormat
from service.db.deliveries import DeliveryClaim
from service.db.tables import now
from service.settings import Settings
from service.upkeep.outbound import Answer, NotAllowed, Outbound, Policy, Unanswered

DELAYS = tuple(
    timedelta(seconds=seconds) for seconds in (10, 60, 5 * 60, 30 * 60, 2 * 3600, 6 * 3600, 15 * 3600)
)  # fmt: skip
"""Between attempts: eight within a day, each delay four times the one before or so."""
MAX_TRIES = len(DELAYS) + 1
JITTER = 0.1
LONGEST_DELAY = timedelta(days=1)
MAX_LOCATION = 200
SECONDS = re.compile(r"[0-9]{1,9}")
MEDIA_TYPES = {
    MessageFormat.STANDARD: "application/json",
    MessageFormat.CLOUDEVENTS: "application/cloudevents+json; charset=utf-8",
}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeliveryOutcome:
    """What came of an attempt; `retry_in` is None where none is to follow."""

    attempt: DeliveryAttempt
    delivered: bool
    gone: bool = False
    retry_in: timedelta | None = None


def policy(settings: Settings) -> Policy:
    """Where webhooks may reach."""
    return Policy(tuple(settings.webhook_allowed_networks), settings.webhook_allow_http)


async def send(outbound: Outbound, claim: DeliveryClaim) -> DeliveryOutcome:
    """Make one attempt."""
    at, began = now(), monotonic()
    answer, error = Answer(), ""
    try:
        content = body(claim)
        answer = await outbound.post(claim.url, content, headers(claim, content, at=at))
    except (NotAllowed, Unanswered) as refusal:
        error = str(refusal)
    except Exception:
        # One message must not keep those beside it from being sent.
        log.exception("message %s to webhook %s could not be sent", claim.id, claim.webhook_id)
        error = "the gateway failed to send it; its log says why"
    delivered = 200 <= answer.status < 300
    attempt = DeliveryAttempt(
        number=claim.attempt,
        at=at,
        seconds=round(monotonic() - began, 3),
        response_code=answer.status or None,
        error="" if delivered else error or _complaint(answer),
        excerpt=answer.excerpt,
    )
    delay = None if delivered else retry_in(claim, answer.headers.get("retry-after"))
    return DeliveryOutcome(attempt, delivered, gone=answer.status == 410, retry_in=delay)


def _complaint(answer: Answer) -> str:
    if 300 <= answer.status < 400 and "location" in answer.headers:
        location = answer.headers["location"][:MAX_LOCATION].encode("ascii", "replace").decode()
        return f"answered {answer.status} with a redirect to {location}, which is not followed"
    return f"answered {answer.status}"


def body(claim: DeliveryClaim) -> bytes:
    """The message as JSON; every attempt sends the same unless the webhook's format was changed."""
    message: dict[str, Any] = {"type": claim.type, "timestamp": _rfc3339(claim.created_at), "data": claim.data}
    if claim.format == MessageFormat.CLOUDEVENTS:
        message = {
            "specversion": "1.0",
            "id": claim.id,
            "source": f"/v1/webhooks/{claim.webhook_id}" if claim.job_id is None else f"/v1/jobs/{claim.job_id}",
            "type": claim.type,
            "time": message["timestamp"],
            "datacontenttype": "application/json",
            "data": claim.data,
        }
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode()


def headers(claim: DeliveryClaim, content: bytes, *, at: datetime) -> dict[str, str]:
    """The headers of an attempt made at a time, signed with every secret that is valid."""
    signatures = (Webhook(secret).sign(claim.id, at, content.decode()) for secret in claim.secrets)
    return {
        "Content-Type": MEDIA_TYPES[claim.format],
        "User-Agent": f"PDTrim-Service/{version('pdtrim')}",
        "webhook-id": claim.id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": " ".join(signatures),
    }


def retry_in(claim: DeliveryClaim, retry_after: str | None) -> timedelta | None:
    """How long to wait after a failure; None when it was the last attempt. A test is made once."""
    if claim.type == TEST_EVENT or claim.tries >= MAX_TRIES:
        return None
    delay = DELAYS[claim.tries - 1] * random.uniform(1 - JITTER, 1 + JITTER)
    return max(delay, min(_wished(retry_after), LONGEST_DELAY))


def _wished(retry_after: str | None) -> timedelta:
    """What the header `Retry-After` asks for (RFC 9110, 10.2.3): seconds, or a date; nothing where it is neither."""
    if retry_after is None:
        return timedelta()
    if SECONDS.fullmatch(retry_after.strip()):
        return timedelta(seconds=int(retry_after))
    try:
        date = parsedate_to_datetime(retry_after)
    except ValueError:
        return timedelta()
    return date.replace(tzinfo=date.tzinfo or UTC) - now()


def _rfc3339(at: datetime) -> str:
    return at.astimezone(UTC).isoformat().replace("+00:00", "Z")
