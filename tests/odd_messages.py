"""What may lie in a broker's queue beside messages of ours."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

ODD_HEADERS: dict[str, Any] = {
    "timelimit": ["soon", 7],
    "eta": 7,
    "expires": {"a": 1},
    "retries": "many",
    "argsrepr": 7,
    "id": None,
    "task": "pdtrim.nothing",
    "lang": 1,
    "group": [1],
    "root_id": {},
    "stamped_headers": 3,
}


def a_message() -> dict[str, Any]:
    """A wake-up as it lies in a queue."""
    headers = {
        "lang": "py",
        "task": "pdtrim.scoring",
        "id": str(uuid.uuid4()),
        "argsrepr": "job_odd",
        "kwargsrepr": "{}",
    }
    delivery = {"exchange": "", "routing_key": "pdtrim"}
    return {
        # [["job_odd"], {}, {}]
        "body": "W1siam9iX29kZCJdLCB7fSwge31d",
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": {
            "correlation_id": headers["id"],
            "delivery_mode": 2,
            "delivery_info": delivery,
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
        },
    }


def odd_messages(one: dict[str, Any]) -> Iterator[bytes]:
    """What may lie in a queue beside messages like this one."""

    def another() -> dict[str, Any]:
        headers = {**one["headers"], "id": str(uuid.uuid4())}
        return {**one, "headers": headers, "properties": {**one["properties"], "delivery_tag": str(uuid.uuid4())}}

    yield from (b"", b"no json", b"\xff\xfe", b"[]", b"null", b"7", b"{}", b'{"headers": {}, "properties": {}}')
    for name, value in ODD_HEADERS.items():
        good = another()
        yield json.dumps({**good, "headers": {**good["headers"], name: value}}).encode()
        good = another()
        without = {key: kept for key, kept in good["headers"].items() if key != name}
        yield json.dumps({**good, "headers": without}).encode()
    for name in one:
        yield json.dumps({**another(), name: 7}).encode()
        yield json.dumps({key: value for key, value in another().items() if key != name}).encode()
    yield json.dumps({**another(), "body": "!!!"}).encode()
