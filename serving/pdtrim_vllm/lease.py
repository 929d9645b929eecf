"""How long prefill keeps the KV cache of a request that decode has not read.

Prefill gives each request a lease, which decode's heartbeats extend, and reuses its blocks when that has ended. A read
that ends later may hold somebody else's keys and values, and NIXL does not say so.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MARGIN_SECONDS = 0.25
"""The two clocks are compared no more exactly than this."""


@dataclass
class Leases:
    """The leases of requests at other engines. All times are seconds of this process's clock."""

    extension: float
    """Seconds from a heartbeat on."""
    heartbeats: dict[str, list[float]] = field(default_factory=dict)
    """Request → when heartbeats for it were sent."""

    def beat(self, request: str, now: float) -> None:
        """A heartbeat was sent for a request."""
        self.heartbeats.setdefault(request, []).append(now)

    def held(self, request: str, end: float, now: float) -> bool:
        """Whether a lease that was to end at `end` still ran at `now`; forgets the request's heartbeats."""
        for sent in self.heartbeats.pop(request, []):
            if sent + MARGIN_SECONDS < end:
                end = max(end, sent + self.extension)
        return now + MARGIN_SECONDS < end

    def forget(self, before: float) -> None:
        """Drop requests without a heartbeat since then, such as those that were aborted."""
        self.heartbeats = {name: times for name, times in self.heartbeats.items() if times[-1] >= before}
