"""The load on a gateway, from a process of its own: a line on stdin says what to do, one on stdout what came of it.

Closed loops: each of `connections` sends its next request when the last one is answered.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import aiohttp

STREAM = {"Accept": "text/event-stream"}


async def requests(session: aiohttp.ClientSession, task: dict[str, Any]) -> dict[str, Any]:
    """Send `method` to each of `paths` in turn for `seconds`; seconds until every answer, and in all."""
    took: list[float] = []
    paths: Sequence[str] = task["paths"]
    started = time.perf_counter()
    stop_at = started + task["seconds"]

    async def loop(number: int) -> None:
        count = number
        while (sent := time.perf_counter()) < stop_at:
            async with session.request(task["method"], paths[count % len(paths)], json=task.get("body")) as response:
                await response.read()
                response.raise_for_status()
            took.append(time.perf_counter() - sent)
            count += 1

    await asyncio.gather(*(loop(number) for number in range(task["connections"])))
    return {"took": took, "seconds": time.perf_counter() - started}


async def streams(session: aiohttp.ClientSession, task: dict[str, Any]) -> dict[str, Any]:
    """Follow a job with many streams; a line on stdout when all are open. Events each received, and their delays."""
    delays: list[float] = []
    received: list[list[int]] = []
    opened = 0

    async def follow() -> None:
        nonlocal opened
        numbers: list[int] = []
        received.append(numbers)
        async with session.get(task["path"], headers=STREAM) as response:
            response.raise_for_status()
            opened += 1
            if opened == task["connections"]:
                print(json.dumps("open"), flush=True)
            async for line in response.content:
                if line.startswith(b"id:"):
                    numbers.append(int(line[3:]))
                elif line.startswith(b"data:"):
                    sent = json.loads(line[5:])["data"].get("sent")
                    if sent is not None:
                        delays.append(time.time() - sent)

    await asyncio.gather(*(follow() for _ in range(task["connections"])))
    return {"delays": delays, "complete": sum(one == list(range(1, task["events"] + 1)) for one in received)}


async def perform(task: dict[str, Any]) -> dict[str, Any]:
    async with aiohttp.ClientSession(
        task["url"],
        headers={"Authorization": f"Bearer {task['key']}"},
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=task["patience"]),
    ) as session:
        act = {"requests": requests, "streams": streams}[task["act"]]
        return await act(session, task)


def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for line in sys.stdin:
        print(json.dumps(asyncio.run(perform(json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
