"""Byte ranges and validators of HTTP (RFC 9110, sections 13 and 14) for files that never change."""

from __future__ import annotations

import re
from dataclasses import dataclass

from starlette.datastructures import Headers

ONE_RANGE = re.compile(r"bytes\s*=\s*([0-9]{0,18})\s*-\s*([0-9]{0,18})", re.IGNORECASE)


@dataclass(frozen=True)
class ByteRange:
    """The bytes from `start` up to, and without, `stop`."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Unsatisfiable(Exception):
    """No byte of the file lies in the range."""


def wanted(headers: Headers, *, size: int, etag: str) -> ByteRange | None:
    """The range that a request for a file of `size` bytes asks for; None for the whole file.

    What is malformed, and several ranges at once, may be answered with the whole file; so may a range whose
    `If-Range` names another version. Raises: Unsatisfiable.
    """
    match = ONE_RANGE.fullmatch(headers.get("Range", "").strip())
    if match is None or headers.get("If-Range", etag).strip() != etag:
        return None
    first, last = match.groups()
    if not first and not last:
        return None
    if not first:
        found = ByteRange(max(size - int(last), 0), size)
    else:
        if last and int(last) < int(first):
            return None
        found = ByteRange(int(first), min(int(last) + 1, size) if last else size)
    if found.start >= found.stop:
        raise Unsatisfiable
    return found


def already_known(headers: Headers, *, etag: str) -> bool:
    """Whether `If-None-Match` names this version, so that the client needs no content."""
    known = [tag.strip().removeprefix("W/") for tag in headers.get("If-None-Match", "").split(",")]
    return etag in known or "*" in known
