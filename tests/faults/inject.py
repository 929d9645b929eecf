"""The faults: what is done to a cluster, by kind, and how often each is done."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
import redis
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import select

from pdtrim.contract.jobs import StageStatus
from service.db.session import transaction
from service.db.tables import JobRow, StageRow
from service.queue import QUEUE
from tests.faults.cluster import Cluster, Member
from tests.faults.workload import LABEL, LICENCE
from tests.odd_messages import a_message, odd_messages

SHARES = {
    "worker's child killed": 8,
    "worker killed": 1,
    "worker killed, child left behind": 1,
    "worker stopped past its lease": 3,
    "gateway killed": 3,
    "reconciler killed": 3,
    "Valkey flushed": 2,
    "Valkey restarted": 2,
    "PostgreSQL restarted (fast)": 1,
    "PostgreSQL restarted (immediate)": 1,
    "store refuses": 2,
    "store stalls": 1,
    "store cuts uploads": 2,
    "disk full": 1,
    "worker asked to end by SIGHUP": 2,
    "odd messages": 2,
    "licence exchanged for a link": 3,
    "hub stalls": 2,
    "store without bulk delete": 2,
}
"""Of how many faults, how many are of each kind, about."""
OF_VALKEY = {"Valkey flushed", "Valkey restarted"}
SECRET = "what no checkpoint may hold"
"""In the file that the exchanged licence leads to."""


def schedule(count: int, rng: random.Random, *, without: Collection[str] = ()) -> list[str]:
    """`count` kinds in random order, each once if they suffice, and beyond that about as often as its share says."""
    shares = {kind: share for kind, share in SHARES.items() if kind not in without}
    kinds, each = list(shares), int(count >= len(shares))
    more = count - each * len(kinds)
    exact = [each + more * share / sum(shares.values()) for share in shares.values()]
    chosen = [kind for kind, wanted in zip(kinds, exact, strict=True) for _ in range(int(wanted))]
    by_rest = sorted(range(len(kinds)), key=lambda i: int(exact[i]) - exact[i])
    chosen += [kinds[i] for i in by_rest[: count - len(chosen)]]
    rng.shuffle(chosen)
    return chosen


@dataclass
class Injector:
    """Does the faults, and undoes after a while those that last."""

    cluster: Cluster
    rng: random.Random
    folders: Mapping[int, Path]
    """The models' own folders, by the jobs' numbers."""
    done: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    _undo: list[tuple[float, Callable[[], object]]] = field(default_factory=list)

    def inject(self, kind: str) -> bool:
        """Do one fault. False when nothing that it could strike is there just now."""
        if kind == "disk full" and self.cluster.full_disk is None:
            self.skipped[kind] = self.skipped.get(kind, 0) + 1
            return True
        if not self._act(kind):
            return False
        self.done[kind] = self.done.get(kind, 0) + 1
        return True

    def undo(self, *, all_of_them: bool = False) -> None:
        """Undo what has lasted long enough."""
        due = [entry for entry in self._undo if all_of_them or entry[0] <= time.monotonic()]
        for entry in due:
            self._undo.remove(entry)
            entry[1]()

    @property
    def lasting(self) -> bool:
        return bool(self._undo) or any(member.stopped_until for member in self.cluster.members)

    def _act(self, kind: str) -> bool:
        cluster, rng = self.cluster, self.rng
        match kind:
            case "worker's child killed":
                return self._kill_busy_child()
            case "worker killed":
                return self._kill("worker", family=True)
            case "worker killed, child left behind":
                return self._kill("worker", family=False)
            case "worker stopped past its lease":
                return self._stop_worker()
            case "gateway killed":
                return self._kill("gateway", family=False)
            case "reconciler killed":
                return self._kill("reconciler", family=False)
            case "Valkey flushed":
                with redis.Redis.from_url(cluster.settings.broker_url) as broker:
                    broker.flushall()
            case "Valkey restarted":
                assert cluster.valkey is not None
                cluster.valkey.terminate()
                time.sleep(rng.uniform(0, 1))
                cluster.valkey.start()
            case "PostgreSQL restarted (fast)":
                self._restart_postgres(signal.SIGINT)
            case "PostgreSQL restarted (immediate)":
                self._restart_postgres(signal.SIGQUIT)
            case "store refuses":
                cluster.proxy.refuse()
                self._later(cluster.proxy.mend)
            case "store stalls":
                cluster.proxy.stall()
                self._later(cluster.proxy.mend)
            case "store cuts uploads":
                cluster.proxy.cut(rng.choice([0, 300, 2000, 20_000]))
                self._later(cluster.proxy.mend)
            case "disk full":
                return self._fill_disk()
            case "worker asked to end by SIGHUP":
                return self._hang_up()
            case "odd messages":
                self._send_odd_messages()
            case "licence exchanged for a link":
                return self._exchange()
            case "hub stalls":
                cluster.hub_proxy.stall()
                self._later(cluster.hub_proxy.mend)
            case "store without bulk delete":
                cluster.limited.limiting = True
                self._later(partial(setattr, cluster.limited, "limiting", False))
            case _:
                raise ValueError(f"no such fault: {kind}")
        return True

    def _later(self, undo: Callable[[], object]) -> None:
        self._undo.append((time.monotonic() + self.rng.uniform(0.3, 3.0), undo))

    def _kill(self, kind: str, *, family: bool) -> bool:
        candidates = self.cluster.of(kind)
        if not candidates:
            return False
        struck = self.rng.choice(candidates).tree()
        for process in struck if family else struck[:1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return bool(struck)

    def _hang_up(self) -> bool:
        candidates = self.cluster.of("worker")
        if len(candidates) < 2:
            return False
        process = self.rng.choice(candidates).process
        assert process is not None
        process.send_signal(signal.SIGHUP)
        return True

    def _send_odd_messages(self) -> None:
        """Beside those of ours, into whichever broker there is; in a folder a table of queues is cut short, too."""
        odd = self.rng.sample(list(odd_messages(a_message())), 5)
        settings = self.cluster.settings
        if self.cluster.valkey is not None:
            with redis.Redis.from_url(settings.broker_url) as broker, suppress(redis.RedisError):
                for message in odd:
                    broker.lpush(QUEUE, message)
            return
        folder = settings.data_dir / "broker"
        for number, message in enumerate(odd):
            (folder / "messages" / f"{time.time_ns()}{number}.{QUEUE}.msg").write_bytes(message)
        for table in folder.glob("control/*.exchange"):
            table.write_bytes(table.read_bytes()[: self.rng.randrange(20)])

    def _exchange(self) -> bool:
        """The licence of a model that a stage reads just now, for a link to what is none of the job's business."""
        try:
            with transaction(self.cluster.database) as session:
                running = select(JobRow).join(StageRow).where(StageRow.status == StageStatus.RUNNING)
                numbers = {int(job.labels[LABEL]) for job in session.exec(running).all()}
        except SQLAlchemyError:
            return False
        candidates = [folder for number in sorted(numbers) if (folder := self.folders.get(number)) is not None]
        if not candidates:
            return False
        secret, licence = self.cluster.folder / "secret", self.rng.choice(candidates) / "LICENSE"
        secret.write_text(SECRET)
        if licence.is_symlink():
            return False
        link = licence.with_name("new")
        link.symlink_to(secret)
        os.replace(link, licence)

        def restore() -> None:
            link.write_text(LICENCE)
            os.replace(link, licence)

        self._later(restore)
        return True

    def _children(self, member: Member) -> list[psutil.Process]:
        return member.tree()[1:]

    def _kill_busy_child(self) -> bool:
        """One that is in the middle of a stage."""
        try:
            busy = {pid for _, pid in running_stages(self.cluster)}
        except SQLAlchemyError:
            return False
        children = [child for member in self.cluster.of("worker") for child in self._children(member)]
        struck = [child for child in children if child.pid in busy]
        if not struck:
            return False
        self.rng.choice(struck).kill()
        return True

    def _stop_worker(self) -> bool:
        """So long that its lease runs out and another worker takes its stage over."""
        candidates = self.cluster.of("worker")
        if len(candidates) < 2:
            return False  # Somebody has to go on.
        member = self.rng.choice(candidates)
        for process in member.tree():
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        member.stopped_until = time.monotonic() + self.rng.uniform(3.5, 6.0)
        return True

    def _restart_postgres(self, how: signal.Signals) -> None:
        self.cluster.postgres.stop(how)
        time.sleep(self.rng.uniform(0, 1))
        self.cluster.postgres.start()

    def _fill_disk(self) -> bool:
        path = self.cluster.full_disk
        assert path is not None
        if path.exists():
            return False
        with path.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"\0" * (1 << 20))
        with path.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"\0")
        self._later(path.unlink)
        return True


def running_stages(cluster: Cluster) -> list[tuple[str, int]]:
    """Jobs with a running stage and the process that runs it, of which there may be none any more."""
    with transaction(cluster.database) as session:
        rows = session.exec(select(StageRow).where(StageRow.status == StageStatus.RUNNING)).all()
    return [(row.job_id, int(row.worker.rpartition(":")[2])) for row in rows if row.worker]


def kill_worker_of(cluster: Cluster, job_ids: set[str]) -> None:
    """Kill the process that runs a stage of these jobs, if it is one of ours."""
    struck = {pid for job_id, pid in running_stages(cluster) if job_id in job_ids}
    for process in cluster.processes() if struck else []:
        if process.pid in struck:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
