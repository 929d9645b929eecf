"""Takes secrets out of what is about to be shown or kept: log lines, events, stored errors, problems, spans.

A secret is known by its value (this process's environment holds it), by its look (keys with a prefix, passwords in
URLs), or by the name before it (`password=…`, `X-Amz-Signature=…`, `Authorization: …`). In doubt it goes: what this
touches is read by people, never by programs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any
from urllib.parse import quote, unquote

MASK = "***"
SHORTEST = 6
"""A shorter value in the environment would blank out ordinary text."""
LONG = 16
"""A value this long is a secret in the middle of a word too."""

# Repetitions are bounded: requests choose some of this text, and must not choose how long a search takes.
_NAME = (
    r"(?:secret[\w-]{0,32}|(?:session|access|refresh|security|auth|api|hf|hub)[_-]?token|[xs][_-]api[_-]?key"
    r"|api[_-]?key|private[_-]?key|passwd|password|passphrase|cookie|signature|credential|\bsig)"
)
_QUOTE = r"(?:b?[\"'])?"
_RULES = [
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (r"\bpdt_[\w-]{8,}", f"pdt_{MASK}"),
        (r"\bhf_[A-Za-z0-9]{16,}", f"hf_{MASK}"),
        (r"\bwhsec_[\w+/=-]{8,}", f"whsec_{MASK}"),
        (r"(://[^\s/?#\"'<>@:]{0,256}:)[^\s\"'<>]{0,1024}@", rf"\1{MASK}@"),
        (r"(://)[^\s/?#\"'<>@:]{1,1024}@", rf"\1{MASK}@"),
        (
            rf"(authorization[\"']?\s{{0,4}}[=:,]\s{{0,4}}{_QUOTE}(?:(?:bearer|basic|digest|token)\s{{1,4}})?)"
            r"(?!(?:bearer|basic|digest|token|aws4-hmac-sha256)\b)[^\s\"'<>,;]+",
            rf"\1{MASK}",
        ),
        (r"\b((?:bearer|basic)\s{1,4})[\w.~+/=-]{8,}", rf"\1{MASK}"),
        (r"([?&](?:token|key)=)[^&\s\"'<>]+", rf"\1{MASK}"),
        (rf"({_NAME}(?:[\"'\]]|%5D)?\s{{0,4}}[=:]\s{{0,4}}{_QUOTE})[^\s\"',;&<>]+", rf"\1{MASK}"),
    )
]
_SECRET_KEY = re.compile(rf"(?:.*[_-])?(?:{_NAME}|authorization)", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"(?:^|_)(?:KEY|TOKEN|PASS|SECRET)(?:$|_)|PASSWORD$", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"://([^\s/?#@:]*):([^\s@]+)@")


def redact(text: str) -> str:
    """`text` with every secret in it masked."""
    known = _known()
    if known is not None:
        text = known.sub(MASK, text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


def scrub(value: Any) -> Any:
    """The same for data: as plain JSON types, its texts redacted, and what stands under a secret's name masked."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {
            redact(str(key)): MASK if content and _SECRET_KEY.fullmatch(str(key)) else scrub(content)
            for key, content in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [scrub(item) for item in value]
    return redact(str(value))


@cache
def _known() -> re.Pattern[str] | None:
    """Matches the secrets of the environment, which like all configuration is read once."""
    found: set[str] = set()
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name):
            found.add(value)
        # A password that is the user's name (postgres:postgres@…) is no secret, but a word that logs need.
        found.update(password for user, password in _URL_PASSWORD.findall(value) if password != user)
    forms = {form for value in found for form in (value, quote(value, safe=""), unquote(value))}
    patterns = [
        re.escape(form) if len(form) >= LONG else rf"(?<!\w){re.escape(form)}(?!\w)"
        for form in sorted(forms, key=len, reverse=True)
        if len(form) >= SHORTEST
    ]
    return re.compile("|".join(patterns)) if patterns else None
