"""Checkpoints that the tests serve: pairs as they were made, and with another pdtrim.json."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
JOB, JOB_PARTS = "job", "job_parts"
"""The pairs that jobs make on a running service; the others are cut from a model without training."""
WORKER_PYTHON = ROOT / ".venv" / "bin" / "python"
"""Where `workers` is installed, which writes checkpoints; this environment is vLLM's."""


@dataclass(frozen=True)
class Case:
    """A prompt, and what transformers goes on with: see `make_pairs`."""

    prompt: list[int]
    decode: list[int]
    prefill: list[int]
    alone: dict[str, list[int]]

    def expected(self, first_token: str) -> list[int]:
        """The answer of the pair whose first token that half says."""
        return self.prefill if first_token == "prefill" else self.decode


@dataclass(frozen=True)
class Checkpoints:
    """The folders of a pair, and its cases."""

    prefill: Path
    decode: Path
    cases: list[Case]

    @property
    def both(self) -> tuple[Path, Path]:
        return self.prefill, self.decode


@dataclass(frozen=True)
class Pairs:
    """`JOB`, `JOB_PARTS`, and pairs by the names in `make_pairs`, each made when it is first asked for."""

    folder: Path

    def get(self, name: str) -> Checkpoints:
        """A pair as it was made."""
        made = self.folder / name
        if not (made / "expected.json").exists():
            script = (
                [HERE / "make_job.py", made]
                if name in (JOB, JOB_PARTS)
                else [HERE / "make_pairs.py", self.folder, name]
            )
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{HERE.parent}"}
            command = [str(part) for part in (WORKER_PYTHON, *script)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr
        cases = [Case(**case) for case in json.loads((made / "expected.json").read_text())]
        roles = ("unified", "unified") if (made / "unified").exists() else ("prefill", "decode")
        return Checkpoints(made / roles[0], made / roles[1], cases)

    def copy(self, name: str, target: Path, *, half: str = "", **changes: Any) -> Checkpoints:
        """A pair whose pdtrim.json, in both halves or in the one named, has other entries."""
        pair = self.get(name)
        copies = []
        for folder in pair.both:
            copied = target / folder.name
            copied.mkdir(parents=True, exist_ok=True)
            for file in folder.iterdir():
                (copied / file.name).unlink(missing_ok=True)
                (copied / file.name).symlink_to(file)
            content = json.loads((folder / "pdtrim.json").read_text())
            (copied / "pdtrim.json").unlink()
            edited = content | (changes if half in ("", folder.name) else {})
            (copied / "pdtrim.json").write_text(json.dumps(edited))
            copies.append(copied)
        return Checkpoints(copies[0], copies[1], pair.cases)
