"""A finished job as it is handed on: what was asked, what was found, and the files, one at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pdtrim.contract.checkpoints import checkpoint_files
from pdtrim.contract.jobs import Job, StageName
from service.db.tables import ArtifactRow
from service.storage import ArtifactStore


@dataclass(frozen=True)
class Record:
    """A job and its artifacts in the store. `check` is asked before every file; what it raises stops all."""

    job: Job
    rows: Sequence[ArtifactRow]
    store: ArtifactStore
    scratch: Path
    check: Callable[[], None]

    @property
    def checkpoints(self) -> dict[str, list[ArtifactRow]]:
        """The files of each checkpoint, by its role."""
        found: dict[str, list[ArtifactRow]] = {}
        for row in checkpoint_files(self.rows):
            found.setdefault(row.name.partition("/")[0], []).append(row)
        return found

    @property
    def papers(self) -> list[ArtifactRow]:
        """What people read besides: the report with its figures, and what the stages decided, as JSON."""
        inside = {row.id for row in checkpoint_files(self.rows)}
        return [
            row
            for row in self.rows
            if row.id not in inside and (row.stage == StageName.EVALUATION or row.name.endswith(".json"))
        ]

    @contextmanager
    def file(self, row: ArtifactRow) -> Iterator[Path]:
        """An artifact as a local file under its own name, for as long as it is needed. Disk holds one at a time."""
        self.check()
        self.scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.scratch, prefix="publish-") as folder:
            path = Path(folder) / Path(row.name).name
            self.store.download(row.key, path)
            yield path
