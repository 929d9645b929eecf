"""The gateway under load: submissions beside a route that does nothing, a million jobs beside a few, many streams.

    python -m benchmarks.service

Real PostgreSQL and Valkey, a gateway process on each of two databases, of which one is loaded at a time, and the load
from another process (`load.py`). Rounds are taken in turns, so that what else the machine does meets both sides.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sqlalchemy import text

from benchmarks.filling import fill
from benchmarks.gateways import NOTHING, SPEC, Target, gateway
from pdtrim.contract.access import DEFAULT_PROJECT
from pdtrim.contract.jobs import StageName
from pdtrim.contract.spec import JobSpec
from service.db import jobs, stages
from service.db.session import transaction
from tests import servers
from tests.stored_jobs import store_job

FEW = 40
PATIENCE_S = 120.0
REPORT_EVENTS = 4
"""Events of a streamed job beside its progress: created, started, cancelling, cancelled."""


@dataclass
class Measured:
    """What several rounds of one kind of request came to."""

    took: list[float] = field(default_factory=list)
    seconds: float = 0.0
    cpu: float = 0.0

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.took) / self.seconds

    @property
    def cpu_ms(self) -> float:
        """CPU time of the gateway for one request."""
        return 1000 * self.cpu / len(self.took)

    def ms(self, share: float) -> float:
        """A percentile of the seconds until the answer."""
        return percentile_ms(self.took, share)


def percentile_ms(seconds: Sequence[float], share: float) -> float:
    return 1000 * sorted(seconds)[min(len(seconds) - 1, int(share * len(seconds)))]


class Load:
    """Context manager: the process that puts load on gateways."""

    def __enter__(self) -> Load:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def begin(self, target: Target, act: str, **task: Any) -> None:
        """Have it do something."""
        assert self._process.stdin is not None
        about = {"url": target.url, "key": target.key, "act": act, "patience": PATIENCE_S}
        self._process.stdin.write(json.dumps({**about, **task}) + "\n")
        self._process.stdin.flush()

    def result(self) -> Any:
        """The next thing it has to say. Raises: RuntimeError when it ended instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the load process failed")
        return json.loads(line)


def in_turns(
    load: Load, kinds: Sequence[tuple[Target, dict[str, Any]]], *, rounds: int, seconds: float, connections: int
) -> list[Measured]:
    """Each kind of request for `seconds` at a time, one after the other, after a round that does not count."""
    results = [Measured() for _ in kinds]
    for number in range(rounds + 1):
        for (target, request), result in zip(kinds, results, strict=True):
            used = target.cpu_seconds()
            load.begin(target, "requests", connections=connections, seconds=seconds, **request)
            found = load.result()
            if number:
                result.took += found["took"]
                result.seconds += found["seconds"]
                result.cpu += target.cpu_seconds() - used
    return results


def submissions(load: Load, target: Target, *, rounds: int, seconds: float) -> None:
    """Print the table of `POST /v1/jobs` beside the route that does nothing."""
    print("| route | connections | requests/s | p50 ms | p99 ms | gateway's CPU ms |\n|---|---|---|---|---|---|")
    ratios = []
    for connections in (1, 8):
        posts = [(target, {"method": "POST", "paths": [path], "body": SPEC}) for path in (NOTHING, "/v1/jobs")]
        nothing, created = in_turns(load, posts, rounds=rounds, seconds=seconds, connections=connections)
        for name, one in (("nothing", nothing), ("`POST /v1/jobs`", created)):
            times = f"{one.ms(0.5):.1f} | {one.ms(0.99):.1f}"
            print(f"| {name} | {connections} | {one.rate:.0f} | {times} | {one.cpu_ms:.2f} |")
        ratios.append(f"{created.rate / nothing.rate:.2f} with {connections}")
    print(f"\nSubmissions beside nothing: {', '.join(ratios)} connections.\n")


def reading(load: Load, few: Target, many: Target, count: int, *, rounds: int, seconds: float) -> None:
    """Print the table of reads on a few and on many jobs."""
    print(
        f"| request | p50 ms, {FEW} jobs | p50 ms, {count:,} | p99 ms, {FEW} jobs | p99 ms, {count:,} | p99's ratio |"
    )
    print("|---|---|---|---|---|---|")
    for name, few_paths, many_paths in both(count):
        gets = [
            (few, {"method": "GET", "paths": few_paths}),
            (many, {"method": "GET", "paths": many_paths}),
        ]
        one, other = in_turns(load, gets, rounds=rounds, seconds=seconds, connections=2)
        times = " | ".join(f"{one.ms(share):.1f} | {other.ms(share):.1f}" for share in (0.5, 0.99))
        print(f"| {name} | {times} | {other.ms(0.99) / one.ms(0.99):.2f} |")
    print(f"\n| request, of {count:,} jobs | p50 ms | p99 ms |\n|---|---|---|")
    for name, path in filtered(count):
        get = (many, {"method": "GET", "paths": [path]})
        (one,) = in_turns(load, [get], rounds=2, seconds=seconds, connections=2)
        print(f"| {name} | {one.ms(0.5):.1f} | {one.ms(0.99):.1f} |")
    print()


def path_of(number: int) -> str:
    return f"/v1/jobs/job_{number:032x}"


def both(count: int) -> list[tuple[str, list[str], list[str]]]:
    """Requests that have the same answers, by size, from a few jobs and from many: names, and paths on either."""
    chosen = random.Random(0).sample(range(1, count), 500)
    few, many = [path_of(number) for number in range(1, FEW)], [path_of(number) for number in chosen]
    return [
        ("list: 20 jobs", ["/v1/jobs"], ["/v1/jobs"]),
        ("list: one of a label", ["/v1/jobs?metadata[run]=run-7"], [f"/v1/jobs?metadata[run]=run-{n}" for n in chosen]),
        ("list: none of a state", ["/v1/jobs?status=running"], ["/v1/jobs?status=running"]),
        ("get", few, many),
        ("events: 10", [f"{path}/events" for path in few], [f"{path}/events" for path in many]),
    ]


def filtered(count: int) -> list[tuple[str, str]]:
    """Requests that only many jobs can answer: names and paths."""
    middle = f"after=job_{count // 2:032x}"
    return [
        ("list, from the middle", f"/v1/jobs?{middle}"),
        ("list of a common state, from the middle", f"/v1/jobs?status=failed&{middle}"),
        ("list of a rare state", "/v1/jobs?status=queued"),
        ("list of a common label", "/v1/jobs?metadata[team]=team-3"),
        ("list of a rare state and a common label", "/v1/jobs?status=queued&metadata[team]=team-0"),
        ("list of a common state and a common label that never meet", "/v1/jobs?status=failed&metadata[team]=team-3"),
        ("list of a label that no job has", "/v1/jobs?metadata[none]=such"),
    ]


def streaming(load: Load, target: Target, *, streams: int, reports: int, a_second: float) -> None:
    """Print what `streams` streams of one job receive, and what they cost."""
    with transaction(target.database) as session:
        job_id = store_job(session, JobSpec.model_validate(SPEC), project=DEFAULT_PROJECT).id
    before, events = target.resident_bytes(), reports + REPORT_EVENTS
    load.begin(target, "streams", path=f"/v1/jobs/{job_id}/events", connections=streams, events=events)
    assert load.result() == "open"
    with transaction(target.database) as session:
        claim = stages.claim(session, job_id, StageName.SCORING, worker="w", lease_seconds=600)
    assert claim is not None
    used, started = target.cpu_seconds(), time.monotonic()
    resident = 0
    for number in range(reports):
        time.sleep(max(0.0, started + number / a_second - time.monotonic()))
        with transaction(target.database) as session:
            data = {"sent": time.time()}
            stages.record_progress(session, claim, progress=number / reports, message="Working.", data=data)
        resident = max(resident, target.resident_bytes())
    with transaction(target.database) as session:
        jobs.request_cancel(session, job_id)
    with transaction(target.database) as session:
        stages.stopped(session, claim)
    found = load.result()
    cpu = (target.cpu_seconds() - used) / (time.monotonic() - started)
    delays = found["delays"]
    print("| streams | events of the job | streams that received each in order | p50 ms | p99 ms | KB a stream | CPU |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {streams} | {events}, {a_second:g} a second | {found['complete']} | {percentile_ms(delays, 0.5):.0f} | "
        f"{percentile_ms(delays, 0.99):.0f} | {(resident - before) / streams / 1000:.0f} | {cpu:.0%} of a core |\n"
    )


def machine(target: Target) -> str:
    with target.database.connect() as connection:
        server = connection.execute(text("SHOW server_version")).scalar()
    packages = ", ".join(f"{name} {version(name)}" for name in ("fastapi", "uvicorn", "sqlalchemy", "psycopg"))
    return f"Python {platform.python_version()}, {packages}, PostgreSQL {server}."


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1_000_000, help="in the large database")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--reports", type=int, default=100, help="progress events that the streams receive")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    with ExitStack() as running, tempfile.TemporaryDirectory() as folder:
        postgres_url, redis_url = running.enter_context(servers.postgres()), running.enter_context(servers.valkey())
        few, many = (
            running.enter_context(gateway(postgres_url, redis_url, name, Path(folder))) for name in ("few", "many")
        )
        print(f"{machine(few)}\n", flush=True)
        load = running.enter_context(Load())
        submissions(load, few, rounds=args.rounds, seconds=args.seconds)
        started = time.monotonic()
        for target, count in ((few, FEW), (many, args.jobs)):
            with target.database.begin() as connection:
                connection.execute(text("TRUNCATE jobs CASCADE"))
            fill(target.database, SPEC, count=count, project=DEFAULT_PROJECT)
        print(f"Filling took {time.monotonic() - started:.0f} s.\n", flush=True)
        reading(load, few, many, args.jobs, rounds=args.rounds, seconds=args.seconds)
        streaming(load, many, streams=args.streams, reports=args.reports, a_second=4)


if __name__ == "__main__":
    main()
