"""Runs jobs on real servers while everything that can fail is made to, and checks that nothing was lost or doubled.

`python -m tests.faults.run --jobs 200 --faults 300 --seed 0 --broker valkey`. The faults, their order and the jobs
follow from the seed; what they meet depends on the machine, and a fault that can strike nothing just now lets the next
go first. Exits with 1, the seed and the events of the jobs concerned on a violation.
"""

from __future__ import annotations

import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy import func
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import col, select

from pdtrim.contract.jobs import JobStatus, StageName, StageStatus
from service.db.session import transaction
from service.db.tables import JobRow, StageRow
from tests.faults import checks
from tests.faults.checks import Violation
from tests.faults.cluster import Cluster, running
from tests.faults.inject import OF_VALKEY, Injector, kill_worker_of, schedule
from tests.faults.workload import LICENCE, Follower, Planned, Submitter, plan
from tests.hub import Hub

START_SECONDS = 180.0
QUIET_SECONDS = 300.0
"""If no stage ends for so long, the run does not wait any longer."""
FOLLOW_EVERY = 7
TICK_S = 0.1
console = Console(width=110)


class Broker(StrEnum):
    VALKEY = "valkey"
    FOLDER = "folder"


def main(
    jobs: Annotated[int, typer.Option(min=3, help="How many jobs.")] = 200,
    faults: Annotated[int, typer.Option(min=0, help="How many faults.")] = 300,
    seed: Annotated[int, typer.Option(help="What jobs and faults follow from.")] = 0,
    broker: Annotated[Broker, typer.Option(help="Valkey, or the folder of embedded mode.")] = Broker.VALKEY,
    folder: Annotated[Path | None, typer.Option(help="Folder to keep with logs; by default a temporary one.")] = None,
) -> None:
    """Run jobs through faults."""
    # Whatever ends the run early, no process of it is left.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    rng = random.Random(seed)
    started = time.monotonic()
    if folder is not None:
        folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="pdtrim-faults-") if folder is None else nullcontext(folder) as name:
        models = Path(name) / "models"
        with running(Path(name), models, broker.value) as cluster:
            without = OF_VALKEY if broker == Broker.FOLDER else ()
            run = Run(cluster, plan(jobs, models, rng), schedule(faults, rng, without=without), rng)
            _write_models(models, run.jobs, cluster.hub)
            _wait_until_ready(cluster)
            run.go()
            violations = run.verdict()
            console.print(run.tables(time.monotonic() - started, seed))
            if violations:
                _tell(cluster, violations, seed)
                sys.exit(1)
    console.print(f"Every job ended as it had to; every invariant holds (seed {seed}).")


class Run:
    """One fault run on a running cluster."""

    def __init__(self, cluster: Cluster, jobs: list[Planned], faults: list[str], rng: random.Random) -> None:
        self.cluster = cluster
        self.jobs = jobs
        self.faults = faults
        # Each of its own seed, so that they do not change one another's.
        folders = {job.number: job.folder for job in jobs if job.folder is not None}
        self.injector = Injector(cluster, random.Random(rng.random()), folders)
        self.submitter = Submitter(jobs, cluster.urls(), random.Random(rng.random()))
        self.followers: dict[str, Follower] = {}
        self.timed_out = False

    def go(self) -> None:
        """Submit everything, inject everything, until every job has ended."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            bars = progress.add_task("jobs", total=len(self.jobs)), progress.add_task("faults", total=len(self.faults))
            self.submitter.start()
            injected, stages_done, quiet_since = 0, 0, time.monotonic()
            waiting = list(self.faults)
            while self.submitter.finished < len(self.jobs) or self.injector.lasting:
                time.sleep(TICK_S)
                self.cluster.tend()
                self.injector.undo()
                try:
                    jobs_done, now_done = self._look()
                except SQLAlchemyError:
                    continue
                if now_done != stages_done:
                    stages_done, quiet_since = now_done, time.monotonic()
                self.submitter.finished = jobs_done
                # As the work goes on, so do the faults.
                while waiting and stages_done >= injected / len(self.faults) * 5 * len(self.jobs):
                    kind = next(filter(self.injector.inject, dict.fromkeys(waiting)), None)
                    if kind is None:
                        break
                    waiting.remove(kind)
                    injected += 1
                progress.update(bars[0], completed=jobs_done)
                progress.update(bars[1], completed=injected)
                if time.monotonic() - quiet_since > QUIET_SECONDS:
                    self.timed_out = True
                    break
            self.injector.undo(all_of_them=True)
        self.submitter.stop()

    def _look(self) -> tuple[int, int]:
        """How many jobs and how many stages are done; also kills who works on poison, deletes, and follows events."""
        ids = dict(self.submitter.ids)
        poison = {ids[job.number] for job in self.jobs if job.poison and job.number in ids}
        with transaction(self.cluster.database) as session:
            statuses = dict(session.exec(select(JobRow.id, JobRow.status)).all())
            ended = (StageStatus.SUCCEEDED, StageStatus.FAILED, StageStatus.CANCELLED)
            stages_done = session.exec(select(func.count()).where(col(StageRow.status).in_(ended))).one()
            distilling = select(StageRow.job_id).where(
                StageRow.name == "distillation", StageRow.status == StageStatus.RUNNING, col(StageRow.progress) > 0
            )
            poisoned = poison & set(session.exec(distilling).all())
        if poisoned:
            kill_worker_of(self.cluster, poisoned)
        done = {job_id for job_id, status in statuses.items() if JobStatus(status).final}
        doomed = {job.number for job in self.jobs if job.deleted}
        for number in doomed - self.submitter.gone:
            if ids.get(number) in done:
                self.submitter.delete(number)
        for number, job_id in ids.items():
            if number % FOLLOW_EVERY == 0 and number not in doomed and job_id not in self.followers:
                self.followers[job_id] = Follower(self.cluster.urls()[number % 2], job_id)
        gone = {ids[number] for number in self.submitter.gone} - statuses.keys()
        return len(done | gone), stages_done + len(StageName) * len(gone)

    def verdict(self) -> list[Violation]:
        """Everything that does not hold; the cluster is stopped on the way."""
        violations = [Violation(error) for error in self.submitter.errors]
        if self.timed_out:
            violations.append(Violation(f"no stage ended for {QUIET_SECONDS:g} s"))
        deadline = time.monotonic() + START_SECONDS
        while not _all_ready(self.cluster) and time.monotonic() < deadline:
            self.cluster.tend()
            time.sleep(0.2)
        while self._doomed_are_there() and time.monotonic() < deadline:
            time.sleep(0.2)
        violations += checks.check_followers(self.cluster, list(self.followers.values()), 70.0)
        violations += checks.check_workers(self.cluster)
        violations += [Violation(what) for what in self.cluster.stop()]
        violations += checks.check_jobs(self.cluster, self.jobs, self.submitter.ids)
        return violations

    def _doomed_are_there(self) -> bool:
        doomed = [self.submitter.ids[number] for number in self.submitter.gone]
        with transaction(self.cluster.database) as session:
            return bool(session.exec(select(JobRow.id).where(col(JobRow.id).in_(doomed))).all())

    def tables(self, seconds: float, seed: int) -> Table:
        """What was done to the service, and what became of the jobs."""
        both = Table.grid(padding=(0, 4))
        faults = Table("fault", "times", title=f"Faults (seed {seed})")
        for kind, times in sorted(self.injector.done.items()):
            faults.add_row(kind, str(times))
        for kind, times in self.injector.skipped.items():
            faults.add_row(f"{kind}: left out, {self.cluster.no_full_disk}", f"({times})")
        faults.add_row("total", str(sum(self.injector.done.values())), style="bold")
        outcomes = Table("planned", "ended", "jobs", title=f"{len(self.jobs)} jobs in {seconds:.0f} s")
        with transaction(self.cluster.database) as session:
            rows = {row.id: checks.outcome_of(row) for row in session.exec(select(JobRow)).all()}
            attempts = session.exec(select(StageRow.attempt)).all()
        ended = Counter(
            (job.outcome, "deleted" if job.deleted else rows.get(self.submitter.ids.get(job.number, ""), "lost"))
            for job in self.jobs
        )
        for (planned, outcome), count in sorted(ended.items()):
            outcomes.add_row(planned, outcome, str(count))
        outcomes.add_row("attempts at stages", "", str(sum(attempts)), style="dim")
        outcomes.add_row("attempts beyond the first", "", str(sum(a - 1 for a in attempts if a)), style="dim")
        outcomes.add_row("event streams followed", "", str(len(self.followers)), style="dim")
        both.add_row(faults, outcomes)
        return both


def _write_models(models: Path, jobs: Sequence[Planned], hub: Hub) -> None:
    from tests.tiny_job import write_tiny_model  # PyTorch: the service starts meanwhile.

    tiny = write_tiny_model(models / "tiny", blocks=4)
    (tiny / "LICENSE").write_text(LICENCE)
    hub.files |= {path.name: path.read_bytes() for path in tiny.iterdir()}
    for job in jobs:
        if job.folder is not None:
            shutil.copytree(tiny, job.folder)


def _all_ready(cluster: Cluster) -> bool:
    try:
        ready = all(httpx.get(f"{url}/readyz", timeout=6, trust_env=False).is_success for url in cluster.urls())
    except httpx.RequestError:
        return False
    return ready and not list(checks.check_workers(cluster))


def _wait_until_ready(cluster: Cluster) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _all_ready(cluster):
        if time.monotonic() > deadline:
            raise SystemExit(f"the service did not become ready; its logs are in {cluster.folder}")
        cluster.tend()
        time.sleep(0.2)


def _tell(cluster: Cluster, violations: list[Violation], seed: int) -> None:
    console.print(f"\n{len(violations)} violations with seed {seed}:", style="bold red")
    for violation in violations:
        console.print(f"- {violation.job_id or ''} {violation.what}", markup=False)
    for job_id in sorted({violation.job_id for violation in violations if violation.job_id}):
        console.print(f"\nEvents of {job_id}:", style="bold")
        console.print(checks.tell_events(cluster, job_id), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
