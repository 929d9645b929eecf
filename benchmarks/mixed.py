"""Honest work beside everything that is known to hold up a service: one gateway, two workers, real servers.

    python -m benchmarks.mixed --minutes 10

Attackers have a key that may submit, and no limit of requests. They send what used to hold up the gateway:
configurations with numbers beyond their tensors, tasks that would be gigabytes, long and odd YAML, models on a hub that
says nothing, connections without a request, wrong keys. Meanwhile somebody else submits, lists, follows events and
cancels, five requests a second, and health is asked for ten times a second. So is a process that does nothing else
than answer: how long that takes is the machine's doing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import socket
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import aiohttp.web
import httpx
import psutil

from benchmarks.service import percentile_ms
from pdtrim.contract.access import Scope
from service.db import keys
from service.db.session import connect, migrate, transaction
from tests import servers
from tests.gateway import write_model
from tests.processes import running
from tests.tiny_job import tiny_spec, write_tiny_model

HALVES = {"prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}}
HEALTH_S, HONEST_S = 0.1, 0.2
"""Between two requests."""
MOST_QUEUED = 10
"""Of the honest jobs; the oldest beyond them is cancelled."""
SUBMISSIONS_AT_ONCE, HALF_OPEN = 45, 400
PATIENCE_S = 60.0
KINDS = ("submit", "list", "events", "get")
Attack = Coroutine[Any, Any, None]


@dataclass
class Seen:
    """What was answered, by what was asked: seconds, and statuses or what broke."""

    took: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    answers: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    async def ask(self, session: aiohttp.ClientSession, what: str, method: str, path: str, **sent: Any) -> Any:
        """Send a request; its JSON, if it has one."""
        began = time.perf_counter()
        try:
            async with session.request(method, path, **sent) as response:
                content = await response.read()
                self.answers[what][str(response.status)] += 1
                return json.loads(content) if response.content_type.endswith("json") else None
        except (aiohttp.ClientError, TimeoutError) as error:
            self.answers[what][type(error).__name__] += 1
            return None
        finally:
            self.took[what].append(time.perf_counter() - began)


def bodies(folder: Path) -> dict[str, list[bytes]]:
    """What attackers send to the routes that check jobs, by its kind."""
    blocks, labels = write_model(folder / "b", num_hidden_layers=10**10), write_model(folder / "l", num_labels=10**8)
    bounded = {"prefill": {"max_perplexity_increase": 0.1}, "decode": {"max_perplexity_increase": 0.2}}
    numbers = [{"model": model.as_uri(), **bounded} for model in (blocks, labels)]
    tasks = []
    for column, repeated in ((90_000, 8_000), (500_000, 50_000)):
        rows = {"q": "x" * min(column, 100_000), "c": ["a", "b"], "t": 0}
        template = "{{q}}" * min(repeated, 19_000)
        task = {"task": "a", "docs": [rows] * 4, "doc_to_text": template, "doc_to_choice": "c", "doc_to_target": "t"}
        tasks.append({"model": "reference", **HALVES, "evaluation": {"tasks": [task]}})
    texts = ["".join(f"- {{q: a, c: [x, y], t: {row % 2}}}\n" for row in range(count)) for count in (2_600, 7_000)]
    yaml = [f"task: a\ndocs:\n{rows}doc_to_text: q\ndoc_to_choice: c\ndoc_to_target: t\n" for rows in texts]
    yaml += [f"task: {odd}\ndocs: 7\n" for odd in ("!!float ''", "!!bool x", "!!int ''", '"\\UFFFFFFFF"', "1:" * 9_000)]
    odd = [{"model": "reference", **HALVES, "evaluation": {"tasks": [text]}} for text in yaml]
    sent = {"numbers": numbers, "tasks": tasks, "yaml": odd, "hub": [{"model": "hf://acme/tiny", **HALVES}]}
    return {kind: [json.dumps(body).encode() for body in of_kind] for kind, of_kind in sent.items()}


def attack(url: str, key: str, folder: str, told: Connection) -> None:
    """All attacks at once until the time (time.time) that is `told`; what was answered is told then."""
    _many_files()
    sent, seen = bodies(Path(folder)), Seen()
    told.send("ready")
    stop_at: float = told.recv()

    async def again(kind: str, sent: list[bytes], path: str, session: aiohttp.ClientSession) -> None:
        count = 0
        while time.time() < stop_at:
            await seen.ask(session, kind, "POST", path, data=sent[count % len(sent)])
            count += 1

    async def half_open() -> None:
        parts = httpx.URL(url)
        while time.time() < stop_at:
            with suppress(OSError, TimeoutError):
                reader, writer = await asyncio.open_connection(parts.host, parts.port)
                writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
                async with asyncio.timeout(PATIENCE_S):
                    await reader.read()
                seen.answers["half-open"]["closed"] += 1
                writer.close()
            await asyncio.sleep(0.1)

    async def wrong_keys(session: aiohttp.ClientSession) -> None:
        count = 0
        while time.time() < stop_at:
            wrong = {"Authorization": f"Bearer pdt_{count:012x}_{'0' * 32}"}
            await seen.ask(session, "wrong key", "GET", "/v1/jobs", headers=wrong)
            count += 1
            await asyncio.sleep(0.1)

    async def all_of_them() -> None:
        async with _session(url, key) as session:
            attacks: list[Attack] = [
                again(kind, sent[kind], path, session)
                for kind in ("numbers", "tasks", "yaml")
                for path in ("/v1/jobs", "/v1/jobs/estimate")
            ]
            attacks += [again("hub", sent["hub"], "/v1/jobs", session) for _ in range(SUBMISSIONS_AT_ONCE)]
            attacks += [half_open() for _ in range(HALF_OPEN)]
            await asyncio.gather(*attacks, wrong_keys(session))

    asyncio.run(all_of_them())
    told.send({kind: (dict(seen.answers[kind]), seen.took.get(kind, [])) for kind in seen.answers})


def answer(told: Connection) -> None:
    """Answer requests, and do nothing else; the port is told first."""
    server = aiohttp.web.Application()

    async def say(request: aiohttp.web.Request) -> aiohttp.web.Response:
        return aiohttp.web.json_response({"status": "ok"})

    server.router.add_get("/", say)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        told.send(bound.getsockname()[1])
        aiohttp.web.run_app(server, sock=bound, print=None)


async def honest(url: str, idle_url: str, key: str, model: Path, stop_at: float) -> tuple[Seen, Counter[str]]:
    """What was answered to honest requests, and how the jobs ended that they submitted."""
    seen, submitted, cancelled = Seen(), list[str](), set[str]()
    spec = tiny_spec(model, distillation={"enabled": False}, search={"algorithm": "greedy"})

    async def every(seconds: float, act: Callable[[int], Coroutine[Any, Any, Any]]) -> None:
        """Begin `act` every so many seconds, whether or not the one before has been answered."""
        began, number, under_way = time.time(), 0, set[asyncio.Task[Any]]()
        while time.time() < stop_at:
            task = asyncio.create_task(act(number))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            number += 1
            await asyncio.sleep(max(0.0, began + number * seconds - time.time()))
        await asyncio.gather(*under_way)

    async with _session(url, key) as session:

        async def health(number: int) -> None:
            await seen.ask(session, "health", "GET", "/healthz")

        async def idle(number: int) -> None:
            await seen.ask(session, "(idle process)", "GET", idle_url)

        async def work(number: int) -> None:
            kind = KINDS[number % len(KINDS)]
            if kind == "submit":
                # Most wait for minutes; a quarter of the time nobody has anything new.
                waiting = [job for job in submitted if job not in cancelled]
                if len(waiting) > MOST_QUEUED and (oldest := await _oldest_queued(seen, session, waiting)):
                    cancelled.add(oldest)
                    await seen.ask(session, "cancel", "POST", f"/v1/jobs/{oldest}/cancel")
                job = await seen.ask(session, "submit", "POST", "/v1/jobs", json=spec)
                submitted.extend([job["id"]] if job and "id" in job else [])
            elif kind == "list" or not submitted:
                await seen.ask(session, "list", "GET", "/v1/jobs")
            else:
                path = f"/v1/jobs/{submitted[number % len(submitted)]}"
                await seen.ask(session, kind, "GET", f"{path}/events" if kind == "events" else path)

        await asyncio.gather(every(HEALTH_S, health), every(HEALTH_S, idle), every(HONEST_S, work))
        ended: Counter[str] = Counter()
        for job_id in submitted:
            job = await Seen().ask(session, "get", "GET", f"/v1/jobs/{job_id}")
            ended[job["status"]] += 1
        return seen, ended


async def _oldest_queued(seen: Seen, session: aiohttp.ClientSession, waiting: list[str]) -> str | None:
    found = await seen.ask(session, "list", "GET", "/v1/jobs?status=queued&limit=100")
    queued = {job["id"] for job in found["data"]} if found else set()
    return next((job for job in waiting if job in queued), None)


def _session(url: str, key: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        url,
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=PATIENCE_S),
    )


def _many_files() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def silent() -> Iterator[str]:
    """The address of a hub to which one can connect, and that never says anything."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=1024)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@dataclass
class Watch:
    """What the service's processes held in memory, in megabytes, and the machine's load."""

    members: dict[str, psutil.Process]
    memory: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    load: list[float] = field(default_factory=list)
    died: set[str] = field(default_factory=set)

    async def look(self, stop_at: float) -> None:
        """Every second until `stop_at`."""
        while time.time() < stop_at:
            for name, process in self.members.items():
                try:
                    of_family = [process, *process.children(recursive=True)]
                    held = 0
                    for one in of_family:
                        with suppress(psutil.NoSuchProcess):  # A worker's child that came to its end.
                            held += one.memory_info().rss
                    self.memory[name].append(held >> 20)
                except psutil.NoSuchProcess:
                    self.died.add(name)
            self.load.append(os.getloadavg()[0])
            await asyncio.sleep(1)

    def table(self) -> str:
        """Memory of each member: at first, at most in each fifth of the time."""
        rows = ["| process | MB at first | at most in each fifth of the time | still there |", "|---|---|---|---|"]
        for name, held in self.memory.items():
            fifth = max(1, len(held) // 5)
            most = ", ".join(str(max(held[start : start + fifth])) for start in range(0, 5 * fifth, fifth))
            rows.append(f"| {name} | {held[0]} | {most} | {'no' if name in self.died else 'yes'} |")
        return "\n".join(rows)


def table(seen: dict[str, tuple[dict[str, int], list[float]]], title: str) -> str:
    """Answers and times by what was asked."""
    rows = [f"| {title} | answers | p50 ms | p99 ms | longest ms |", "|---|---|---|---|---|"]
    for what, (answers, took) in sorted(seen.items()):
        told = ", ".join(f"{count} x {status}" for status, count in sorted(answers.items()))
        times = " | ".join(f"{percentile_ms(took, share):.0f}" for share in (0.5, 0.99, 1.0)) if took else "| |"
        rows.append(f"| {what} | {told} | {times} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    args = parser.parse_args()
    _many_files()
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="pdtrim-mixed-") as name:
        folder = Path(name)
        postgres = stack.enter_context(servers.postgres())
        broker, s3 = stack.enter_context(servers.valkey()), stack.enter_context(servers.seaweedfs())
        hub = stack.enter_context(silent())
        (port,) = servers.free_ports(1)
        models = folder / "models"
        environment = os.environ | s3.environment | {
            "PDTRIM_DATABASE_URL": postgres,
            "PDTRIM_BROKER_URL": broker,
            "PDTRIM_ARTIFACTS_URL": f"s3://{s3.bucket}/mixed",
            "PDTRIM_S3_ENDPOINT_URL": s3.endpoint_url,
            "PDTRIM_DATA_DIR": str(folder / "data"),
            "PDTRIM_PORT": str(port),
            "PDTRIM_ALLOWED_SOURCES": json.dumps(["reference", "builtin:", "hf://", models.as_uri()]),
            "PDTRIM_RATE_LIMIT": "none",
            "HF_ENDPOINT": hub,
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        model = write_tiny_model(models / "tiny")
        database = connect(postgres)
        migrate(database)
        with transaction(database) as session:
            made = [
                keys.create(session, project=project, name="load", scopes=[Scope.READ, Scope.SUBMIT])[1]
                for project in ("ours", "theirs")
            ]
        database.dispose()
        commands = {"gateway": ["gateway"], "worker 1": ["worker"], "worker 2": ["worker"]}
        members = {
            name: psutil.Process(stack.enter_context(running(command, environment, folder / f"{name}.log")).pid)
            for name, command in commands.items()
        }
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url)
        attacker, idle = _begun(attack, url, made[1], str(models)), _begun(answer)
        idle_url = f"http://127.0.0.1:{idle.recv()}/"
        assert attacker.recv() == "ready"
        stop_at = time.time() + 60 * args.minutes
        attacker.send(stop_at)
        watch = Watch(members)

        async def both() -> tuple[Seen, Counter[str]]:
            doing = honest(url, idle_url, made[0], model, stop_at)
            (seen, ended), _ = await asyncio.gather(doing, watch.look(stop_at))
            return seen, ended

        seen, ended = asyncio.run(both())
        attacked = attacker.recv()
        log_bytes = sum(path.stat().st_size for path in folder.glob("*.log"))
        load = f"{min(watch.load):.1f} to {max(watch.load):.1f}"
        print(f"{args.minutes:g} minutes; the machine's load {load}; logs of {log_bytes / 1e6:.1f} MB.\n")
        print(table({what: (dict(seen.answers[what]), seen.took[what]) for what in seen.answers}, "honest"), "\n")
        print(f"Honest jobs: {', '.join(f'{count} {status}' for status, count in ended.items())}.\n")
        print(table(attacked, "attack"), "\n")
        print(watch.table())


def _begun(act: Callable[..., None], *given: Any) -> Connection:
    """What a process of its own that does `act` tells, and is told."""
    near, far = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=act, args=(*given, far), daemon=True).start()
    return near


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        time.sleep(0.2)
    raise RuntimeError("the gateway did not start")


if __name__ == "__main__":
    main()
