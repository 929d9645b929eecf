"""Which of a job's artifacts are its checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from pdtrim.contract.jobs import StageName


class _File(Protocol):
    @property
    def stage(self) -> StageName: ...

    @property
    def name(self) -> str: ...


File = TypeVar("File", bound=_File)


def checkpoint_files(artifacts: Iterable[File]) -> list[File]:
    """Export's files, by name. Evaluation's of the same name take their places: model cards with what was measured."""
    found = list(artifacts)
    files = {file.name: file for file in found if file.stage == StageName.EXPORT}
    files |= {file.name: file for file in found if file.stage == StageName.EVALUATION and file.name in files}
    return [files[name] for name in sorted(files)]
