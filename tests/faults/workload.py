"""The jobs of a fault run, and the client that submits them through whichever gateway is alive."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

from pdtrim.client import Client, ClientError
from tests.hub import REPOSITORY

TEXT = "".join(f"value_{i} = {i} * {i + 1}\n" for i in range(300))
LABEL = "fault-run-job"
LICENCE = "Do as you like.\n"
IN_FLIGHT = 8
RETRY_S = 0.2


@dataclass
class Planned:
    """A job and how it has to end: `succeeded`, or the code of the error with which it fails."""

    number: int
    spec: dict[str, Any]
    outcome: str = "succeeded"
    poison: bool = False
    """Whoever works on its distillation is killed."""
    folder: Path | None = None
    """Its model's own folder, whose licence may be exchanged for a link while one of its stages runs. A stage that
    begins meanwhile is right to refuse it."""
    deleted: bool = False
    """It is deleted once it has ended, and has to be gone with all it left."""

    @property
    def outcomes(self) -> set[str]:
        """How it may end."""
        return {self.outcome, "source_not_allowed", "source_unreadable"} if self.folder else {self.outcome}


def plan(count: int, models: Path, rng: random.Random) -> list[Planned]:
    """`count` small jobs in random order. One in eight distils, as many have their model from the hub, one in twelve
    has its own, as many are deleted, and for every 60 one each is poison, hopeless, late.
    """
    special = max(1, count // 60)
    kinds = ["poison", "hopeless", "late"] * special
    kinds += ["distilled", "hub"] * (count // 8)
    kinds += ["exchanged", "deleted"] * (count // 12)
    kinds += ["plain"] * (count - len(kinds))
    rng.shuffle(kinds)
    return [_planned(number, kind, models, rng) for number, kind in enumerate(kinds)]


def _planned(number: int, kind: str, models: Path, rng: random.Random) -> Planned:
    spec: dict[str, Any] = {
        "model": (models / "tiny").as_uri(),
        "prefill": {"remove_blocks": 1},
        "decode": {"remove_blocks": rng.choice([1, 2])},
        "data": {"text": TEXT},
        "calibration": {"windows": 2, "window_tokens": 16},
        "search": {"algorithm": rng.choice(["greedy", "exhaustive"])},
        "distillation": {"enabled": False},
        "evaluation": {"windows": 2, "speed_tokens": 1, "speed_repeats": 1},
        "seed": number,
        "metadata": {LABEL: str(number)},
    }
    steps = {"heal_tokens": 128, "batch_windows": 2, "threshold": 1.0}
    match kind:
        case "distilled":
            return Planned(number, {**spec, "distillation": steps})
        case "hopeless":
            return Planned(number, {**spec, "data": {"text": "too short " * 8}}, "invalid_request")
        case "late":
            return Planned(number, {**spec, "deadline_seconds": 0.001}, "deadline_exceeded")
        case "hub":
            return Planned(number, {**spec, "model": f"hf://{REPOSITORY}"})
        case "exchanged":
            own = models / f"own-{number}"
            return Planned(number, {**spec, "model": own.as_uri()}, folder=own)
        case "deleted":
            return Planned(number, spec, deleted=True)
        case "poison":
            endless = {**steps, "heal_tokens": 10**9, "patience": None}
            return Planned(number, {**spec, "distillation": endless}, "attempts_exhausted", poison=True)
        case _:
            return Planned(number, spec)


@dataclass
class Submitter:
    """Submits jobs in a thread, so many at a time, each with one Idempotency-Key until some gateway answers 201.

    `finished` is told from outside; `ids` are the jobs' ids as they were answered.
    """

    jobs: Sequence[Planned]
    urls: Sequence[str]
    rng: random.Random
    finished: int = 0
    gone: set[int] = field(default_factory=set)
    """Jobs that were deleted."""
    ids: dict[int, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._submit_all, name="submitter", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.stopping.set()
        self._thread.join()

    def _submit_all(self) -> None:
        with httpx.Client(timeout=10, trust_env=False) as http:
            for job in self.jobs:
                while len(self.ids) - self.finished >= IN_FLIGHT and not self.stopping.is_set():
                    time.sleep(0.05)
                self._submit(http, job)

    def _submit(self, http: httpx.Client, job: Planned) -> None:
        headers = {"Idempotency-Key": f'"{uuid4()}"'}
        while not self.stopping.is_set():
            try:
                answer = http.post(f"{self.rng.choice(self.urls)}/v1/jobs", json=job.spec, headers=headers)
            except httpx.RequestError:
                time.sleep(RETRY_S)
                continue
            if answer.status_code == 201:
                self.ids[job.number] = answer.json()["id"]
                return
            # Its first request may still be on its way, or a server behind the gateway may be away.
            if answer.status_code not in (409, 503):
                self.errors.append(f"job {job.number} was refused with {answer.status_code}: {answer.text}")
                return
            time.sleep(RETRY_S)

    def delete(self, number: int) -> None:
        """Delete a job that has ended, if a gateway answers just now."""
        with suppress(httpx.RequestError):
            answer = httpx.delete(
                f"{self.rng.choice(self.urls)}/v1/jobs/{self.ids[number]}", timeout=3, trust_env=False
            )
            if answer.status_code in (202, 204, 404):
                self.gone.add(number)
            elif answer.status_code != 503:
                self.errors.append(f"job {number} was not deleted: {answer.status_code} {answer.text}")


class Follower:
    """Follows the events of one job through one gateway, from its first to its last, in a thread."""

    def __init__(self, url: str, job_id: str) -> None:
        self.job_id = job_id
        self.numbers: list[int] = []
        self.error = ""
        self._url = url
        self._thread = threading.Thread(target=self._follow, name=f"follower-{job_id}", daemon=True)
        self._thread.start()

    def join(self, seconds: float) -> bool:
        """Whether it came to the end."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _follow(self) -> None:
        try:
            with Client(self._url) as client:
                self.numbers += [event.number for event in client.events(self.job_id)]
        except ClientError as error:
            self.error = str(error)
