"""The folder by which the ranks that heal a job and the stage that started them know of each other.

| path | has | written by |
|---|---|---|
| `job.json` | the job's specification | the stage, or who starts ranks by hand |
| `limits.json` | what a rank may take; without it, what is free | the stage |
| `in/STAGE/NAME` | what the stages before found | the same |
| `windows.safetensors` | the windows of training and folding; without it, those of scoring | the stage |
| `progress.json` | how far healing is | rank 0 |
| `folds-HALF.safetensors`, `folds-HALF.json` | what can be folded, and how well | rank 0 |
| `states/HALF/STEP/` | a state, sharded | every rank |
| `states/HALF.json` | the step of the newest whole state | rank 0 |
| `states/storing` | is there while the stage stores a state, which nobody may delete then | the stage |
| `failed-RANK.json` | why a rank ended | the rank |
| `out/` | what the stage leaves | rank 0 |
| `result.json` | what the stage found; there when all is done | rank 0 |
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from pydantic import BaseModel

from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import Half
from workers.inputs.faults import may_pass

KEPT_STATES = 2
POLL_S = 0.2
Content = TypeVar("Content", bound=BaseModel)
Kind = Literal["input", "memory", "disk", "internal"]


class Limits(BaseModel):
    """What a rank may take of its device's memory; None for what is free."""

    memory_bytes: int | None = None


class Progress(BaseModel):
    """How far healing is, as `StageContext.say` takes it."""

    progress: float
    message: str
    figures: dict[str, int | float | str | list[int]]


class NewestState(BaseModel):
    """The newest state of a half that is whole."""

    step: int


class Failure(BaseModel):
    """Why a rank ended, and when by the clock of its machine."""

    kind: Kind
    message: str
    at: float

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """As the stage would tell its own errors apart."""
        kind: Kind = "internal"
        if isinstance(error, ValueError):
            kind = "input"
        elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
            kind = "memory"
        elif may_pass(error):
            kind = "disk"
        said = str(error) if kind != "internal" else f"{type(error).__name__}: {error}"
        return cls(kind=kind, message=said, at=time.time())

    def error(self) -> Exception:
        """What the stage raises in its stead."""
        if self.kind == "input":
            return ValueError(self.message)
        if self.kind == "memory":
            return MemoryError(self.message)
        if self.kind == "disk":
            return OSError(errno.ENOSPC, self.message)
        return RuntimeError(self.message)


@dataclass(frozen=True)
class HealingFolder:
    """Such a folder, seen from either side."""

    path: Path

    @property
    def job(self) -> Path:
        return self.path / "job.json"

    @property
    def windows(self) -> Path:
        return self.path / "windows.safetensors"

    @property
    def limits(self) -> Path:
        return self.path / "limits.json"

    @property
    def progress(self) -> Path:
        return self.path / "progress.json"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def states(self) -> Path:
        return self.path / "states"

    def folds(self, half: Half) -> Path:
        """What can be folded of a half."""
        return self.path / f"folds-{half}.safetensors"

    def folding(self, half: Half) -> Path:
        """How well."""
        return self.path / f"folds-{half}.json"

    def failed(self, rank: int) -> Path:
        """Where a rank says why it ended."""
        return self.path / f"failed-{rank}.json"

    def inputs(self) -> list[tuple[StageName, str]]:
        """What there is of the stages before."""
        below = self.path / "in"
        found = (path.relative_to(below).parts for path in below.rglob("*") if path.is_file())
        return [(StageName(stage), "/".join(name)) for stage, *name in found]

    def newest_step(self, half: Half) -> int | None:
        """The step of a half's newest whole state."""
        found = read(self.states / f"{half}.json", NewestState)
        return None if found is None else found.step

    def newest(self, half: Half) -> Path | None:
        """Its folder."""
        step = self.newest_step(half)
        return None if step is None else self.state(half, step)

    def state(self, half: Half, step: int) -> Path:
        return self.states / half / str(step)

    def commit(self, half: Half, step: int) -> None:
        """Count a state that all ranks have written, and delete all but the newest of those before."""
        write(self.states / f"{half}.json", NewestState(step=step))
        for old in sorted(map(int, os.listdir(self.states / half)))[:-KEPT_STATES]:
            shutil.rmtree(self.state(half, old))

    def tidy(self) -> None:
        """Delete what ranks that were killed left unfinished."""
        self.result.unlink(missing_ok=True)
        (self.states / "storing").unlink(missing_ok=True)
        for failed in self.path.glob("failed-*.json"):
            failed.unlink()
        for states in self.states.glob("*/"):
            newest = read(self.states / f"{states.name}.json", NewestState)
            for state in states.iterdir():
                if newest is None or state.name != str(newest.step):
                    shutil.rmtree(state)

    @property
    def is_storing(self) -> bool:
        """Whether the stage stores a state."""
        return (self.states / "storing").exists()

    @contextmanager
    def storing(self) -> Iterator[None]:
        """While this lasts, no state is deleted."""
        mark = self.states / "storing"
        mark.touch()
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)


def write(path: Path, content: BaseModel) -> None:
    """Write JSON so that nobody reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(content.model_dump_json())
    part.replace(path)


def read(path: Path, kind: type[Content]) -> Content | None:
    """What `write` wrote, if it did."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
