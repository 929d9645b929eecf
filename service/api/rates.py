"""How many requests one caller may make: counted in the broker's Redis, so by all gateways together.

The sliding window counter of `limits` weighs the window before the present one, so there is no burst at its border.
Header fields: draft-ietf-httpapi-ratelimit-headers-10.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from functools import cache
from threading import Lock

from limits import RateLimitItem, parse
from limits.errors import StorageError
from limits.storage import MemoryStorage, RedisStorage, Storage
from limits.strategies import SlidingWindowCounterRateLimiter
from redis.backoff import NoBackoff
from redis.retry import Retry

from pdtrim.contract.access import UNLIMITED, Rate

log = logging.getLogger(__name__)

REDIS = ("redis://", "rediss://")
PREFIX = "pdtrim-rates"
ANSWER_S = 0.5
"""A Redis that takes longer to answer is away: no request is to wait for it."""
AWAY_S = 5.0
"""How long nobody asks a Redis that was away."""


@dataclass(frozen=True)
class Allowance:
    """What became of a request under a rate: `granted` or not, `remaining` requests, `reset_s` until there are more."""

    policy: str
    limit: RateLimitItem
    granted: bool
    remaining: int
    reset_s: int

    @property
    def headers(self) -> dict[str, str]:
        """The header fields that tell the client."""
        told = {
            "RateLimit-Policy": f'"{self.policy}";q={self.limit.amount};w={self.limit.get_expiry()}',
            "RateLimit": f'"{self.policy}";r={self.remaining};t={self.reset_s}',
        }
        return told if self.granted else {**told, "Retry-After": str(self.reset_s)}


class Rates:
    """Counts requests in Redis where the broker is one, else in this process's memory.

    While Redis is away nothing is counted and everything is let through; the log says so once.
    """

    def __init__(self, broker_url: str) -> None:
        self._limiter = SlidingWindowCounterRateLimiter(_storage(broker_url))
        self._lock = Lock()
        self._away_until: float | None = None

    def spend(self, policy: str, rate: Rate, who: str) -> Allowance | None:
        """Count a request of somebody; None where there is no limit, or no count."""
        if rate == UNLIMITED or (self._away_until is not None and time.monotonic() < self._away_until):
            return None
        limit = _parsed(rate)
        try:
            granted = self._limiter.hit(limit, policy, who)
            reset_at, remaining = self._limiter.get_window_stats(limit, policy, who)
        except StorageError as error:
            self._is_away(error)
            return None
        self._is_back()
        reset_s = max(1, math.ceil(reset_at - time.time()))
        return Allowance(policy, limit, granted, remaining if granted else 0, reset_s)

    def _is_away(self, error: Exception) -> None:
        with self._lock:
            if self._away_until is None:
                log.warning("rate limits are not enforced while their Redis is away: %s", error)
            self._away_until = time.monotonic() + AWAY_S

    def _is_back(self) -> None:
        if self._away_until is None:
            return
        with self._lock:
            if self._away_until is not None and time.monotonic() >= self._away_until:
                log.warning("rate limits are enforced again")
                self._away_until = None


@cache
def _parsed(rate: Rate) -> RateLimitItem:
    return parse(rate)


def _storage(broker_url: str) -> Storage:
    if not broker_url.startswith(REDIS):
        return MemoryStorage()
    return RedisStorage(
        broker_url,
        key_prefix=PREFIX,
        wrap_exceptions=True,
        socket_timeout=ANSWER_S,
        socket_connect_timeout=ANSWER_S,
        # At once, for a connection that a restart left behind; by default redis-py would go on trying for seconds.
        retry=Retry(NoBackoff(), 1),  # type: ignore[arg-type]
    )
