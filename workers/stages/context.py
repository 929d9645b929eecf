"""What a stage may touch: its specification, its inputs, a folder for its outputs, a place for progress and state."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import Result
from pdtrim.contract.spec import JobSpec
from service.sources import Row
from service.stopping import Check, interruptible
from service.storage import ObjectNotFound, StoredObject
from workers.inputs.faults import CorruptArtifact
from workers.pruning.model.composite import Composite

PROGRESS_INTERVAL_S = 1.0
READ_BYTES = 1 << 22
Figure = float | str | list[int]
Say = Callable[[float, str, Mapping[str, Figure]], None]
Content = TypeVar("Content", bound=BaseModel)


class Store(Protocol):
    """What a stage uses of an artifact store."""

    def put_file(self, key: str, path: Path) -> StoredObject: ...

    def put_bytes(self, key: str, data: bytes) -> StoredObject: ...

    def get_bytes(self, key: str) -> bytes: ...

    def download(self, key: str, path: Path) -> None: ...


@dataclass(frozen=True)
class StoredInput:
    """An artifact of an earlier stage: its key in the store and the SHA-256 of its bytes."""

    key: str
    sha256: str


@dataclass(frozen=True)
class Parent:
    """The job from whose frontier this one was cut: what its run of the same stage found, and where that kept state.

    The artifacts that it left are among the inputs, under the same stage's name.
    """

    job_id: str
    result: Result
    state_prefix: str


@dataclass
class StageContext:
    """One run of one stage. `check` raises when the stage must stop; `publish` announces progress."""

    job_id: str
    spec: JobSpec
    source_dir: Path
    """The model as it was given."""
    model_revision: str | None
    workdir: Path
    inputs: dict[tuple[StageName, str], StoredInput]
    store: Store
    state_prefix: str
    rows: Callable[[], Iterable[Row] | None]
    """Opens the job's data; None stands for the Python standard library."""
    check: Check
    publish: Say
    parent: Parent | None = None
    """Where the stage's work was done before, if this job was cut from another."""
    memory_bytes: int | None = None
    """What the worker may take of each device's memory; None for what is free."""
    _reported_at: float = field(default=0.0, init=False)

    @cached_property
    def composite(self) -> Composite | None:
        """The vision-language model whose text decoder the job prunes; None of a model of text alone.

        Raises: BrokenCheckpoint, ImpossibleModel, UnsupportedArchitecture.
        """
        return Composite.of(self.source_dir, self.check)

    @cached_property
    def model_dir(self) -> Path:
        """The model that is pruned: the one given, or its text decoder alone. Raises: as `composite`."""
        if self.composite is None:
            return self.source_dir
        folder = self.workdir / "decoder"
        interruptible(self.check, partial(self.composite.write_text, folder, self.check))
        return folder

    def decoder_of(self, checkpoint: Path) -> Path:
        """An exported checkpoint, or the text decoder alone of one that sees. Raises: as `composite`."""
        whole = Composite.of(checkpoint, self.check)
        if whole is None:
            return checkpoint
        folder = self.workdir / "decoders" / checkpoint.name
        interruptible(self.check, partial(whole.write_text, folder, self.check))
        return folder

    @property
    def out(self) -> Path:
        """The folder whose files become the stage's artifacts."""
        folder = self.workdir / "out"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def say(self, progress: float, message: str, **figures: Figure) -> None:
        """Announce progress (0…1), at most once a second. Raises: StopRequested, LeaseLost."""
        self.check()
        if time.monotonic() - self._reported_at >= PROGRESS_INTERVAL_S:
            self._reported_at = time.monotonic()
            self.publish(progress, message, figures)

    def input(self, stage: StageName, name: str) -> Path:
        """An earlier stage's artifact as a local file. Raises: KeyError, CorruptArtifact, StoreUnavailable."""
        stored = self.inputs[stage, name]
        path = self.workdir / "in" / stage / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.store.download(stored.key, path)
            found = self._sha256(path)
            if found != stored.sha256:
                path.unlink()
                raise CorruptArtifact(f"{stored.key} has SHA-256 {found}, recorded was {stored.sha256}")
        return path

    def _sha256(self, path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(READ_BYTES):
                self.check()
                digest.update(chunk)
        return digest.hexdigest()

    def read(self, stage: StageName, name: str, kind: type[Content]) -> Content:
        """An earlier stage's JSON artifact, which holds one of `kind`. Raises: ValidationError; as `input`."""
        return kind.model_validate_json(self.input(stage, name).read_bytes())

    def input_folder(self, stage: StageName, prefix: str) -> Path:
        """Every artifact of an earlier stage below `prefix`, as a folder. Raises: as `input`."""
        for owner, name in self.inputs:
            if owner == stage and name.startswith(f"{prefix}/"):
                self.input(owner, name)
        return self.workdir / "in" / stage / prefix

    def write_json(self, name: str, content: BaseModel) -> None:
        """Write an output as JSON whose bytes depend on `content` alone."""
        path = self.out / name
        found = content.model_dump(mode="json")
        path.write_text(json.dumps(found, indent=2, sort_keys=True, allow_nan=False) + "\n")

    def save_state(self, name: str, data: bytes) -> None:
        """Keep what a later attempt needs to go on from here. Raises: StoreUnavailable."""
        self.store.put_bytes(f"{self.state_prefix}/{name}", data)

    def load_state(self, name: str) -> bytes | None:
        """What an earlier attempt kept, or else the parent's run of this stage, or None. Raises: StoreUnavailable."""
        for prefix in self._states:
            with suppress(ObjectNotFound):
                return self.store.get_bytes(f"{prefix}/{name}")
        return None

    @property
    def _states(self) -> list[str]:
        return [self.state_prefix, *([] if self.parent is None else [self.parent.state_prefix])]

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors as `save_state` keeps bytes; as a file, since in memory they would be there twice."""
        path = self.workdir / name
        self.write_tensors(path, tensors)
        self.keep_file(name, path)
        path.unlink()

    def keep_file(self, name: str, path: Path) -> None:
        """Keep a file as `save_state` keeps bytes."""
        self.store.put_file(f"{self.state_prefix}/{name}", path)

    def load_tensors(self, name: str) -> dict[str, Tensor] | None:
        """What `save_tensors` kept, as `load_state` finds it. Raises: StoreUnavailable."""
        path = self.workdir / f"kept-{name}"
        # The tensors lie in the file, which goes with the folder.
        return load_file(path) if self.fetch_kept(name, path) else None

    def fetch_kept(self, name: str, path: Path) -> bool:
        """Copy to `path` what `keep_file` kept, as `load_state` finds it; whether there is any. Raises: as that."""
        for prefix in self._states:
            with suppress(ObjectNotFound):
                self.store.download(f"{prefix}/{name}", path)
                return True
        return False

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a safetensors file of any size. Raises: as `say`."""
        interruptible(self.check, partial(save_file, dict(tensors), path))
