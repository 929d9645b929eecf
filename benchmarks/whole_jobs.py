"""The stages of a job, one after the other in this process: what a worker does, without gateway, queue and database."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import Result
from pdtrim.contract.spec import JobSpec
from service.sources import Row, Text
from service.storage.local import LocalStore
from workers.inputs.models import give_back_memory
from workers.stages import STAGES
from workers.stages.context import Say, StageContext, StoredInput

UP_TO_EXPORT = (StageName.SCORING, StageName.REMOVAL, StageName.DISTILLATION, StageName.EXPORT)


def say_nothing(progress: float, message: str, figures: Mapping[str, float | str | list[int]]) -> None:
    """Nobody watches."""


@dataclass
class WholeJob:
    """A job whose artifacts are files below `folder`, in a folder of their own for each stage."""

    spec: JobSpec
    model: Path
    """The dense model's folder."""
    documents: Sequence[str] | None
    """None stands for the Python standard library."""
    folder: Path
    memory_bytes: int | None = None
    """What the stages may take of the device's memory."""
    publish: Say = say_nothing
    results: dict[StageName, Result] = field(default_factory=dict)
    seconds: dict[StageName, float] = field(default_factory=dict)

    def run(self, stages: Sequence[StageName] = UP_TO_EXPORT) -> None:
        """Run stages in their order. Raises: what a stage raises."""
        for stage in stages:
            give_back_memory()
            start = time.perf_counter()
            self.results[stage] = STAGES[stage](self._context(stage))
            self.seconds[stage] = time.perf_counter() - start

    def artifacts(self, stage: StageName) -> Path:
        """The folder with what a stage left."""
        return self.folder / stage / "out"

    def _context(self, stage: StageName) -> StageContext:
        return StageContext(
            job_id=self.folder.name,
            spec=self.spec,
            source_dir=self.model,
            model_revision=None,
            workdir=self.folder / stage,
            inputs=dict(self._inputs()),
            store=LocalStore(self.folder / "store"),
            state_prefix=f"{stage}/state",
            rows=self._rows,
            check=lambda: None,
            publish=self.publish,
            memory_bytes=self.memory_bytes,
        )

    def _rows(self) -> list[Row] | None:
        return None if self.documents is None else [Text(document, "the benchmark") for document in self.documents]

    def _inputs(self) -> Mapping[tuple[StageName, str], StoredInput]:
        """What the stages so far left, put into the store."""
        store = LocalStore(self.folder / "store")
        found: dict[tuple[StageName, str], StoredInput] = {}
        for stage in self.results:
            # Evaluation reads checkpoints from the store too; what is measured here reads the folder.
            for path in sorted(path for path in self.artifacts(stage).rglob("*") if path.is_file()):
                name = path.relative_to(self.artifacts(stage)).as_posix()
                key = f"{stage}/{name}"
                found[stage, name] = StoredInput(key, store.put_file(key, path).sha256)
        return found


def layer_map(checkpoint: Path) -> list[int]:
    """Decode's layers as prefill's, as an exported checkpoint says."""
    found: list[int] = json.loads((checkpoint / "pdtrim.json").read_text())["kv_layer_map"]
    return found
