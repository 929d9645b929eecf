"""Numbers and lists for people, in one form wherever they are shown."""

from __future__ import annotations

from collections.abc import Iterable

NOTHING = "none"
UNKNOWN = "unknown"


def size(number: float) -> str:
    """Bytes."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}" if number < 999.5 else f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:,.3g} GiB" if number < 999.5 else f"{number:,.0f} GiB"


def duration(seconds: float) -> str:
    """A time span."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def counted(blocks: int) -> str:
    """A number of blocks."""
    return f"{blocks} block{'' if blocks == 1 else 's'}"


def listed(items: Iterable[object]) -> str:
    """Several things in one cell."""
    return ", ".join(map(str, items)) or NOTHING


def increase(fraction: float) -> str:
    """A fraction by which something grew."""
    return f"{fraction:+.1%}"
