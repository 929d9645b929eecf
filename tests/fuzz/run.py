"""Fuzz one target with atheris: `python -m tests.fuzz.run TARGET SECONDS MEMORY_MB`.

Starts from the seeds and what earlier runs found, and writes what it finds to the corpus, which tests replay.
"""

from __future__ import annotations

import random
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["service"]):
    from tests.fuzz.mutation import changed_header, changed_json
    from tests.fuzz.targets import TARGETS

HERE = Path(__file__).parent
CHANGES = {"safetensors_header": changed_header, "job_spec": changed_json}
BYTEWISE = 0.3
"""Share of inputs that are changed byte by byte."""


def main(target: str, seconds: str, memory_mb: str) -> None:
    def change(data: bytes, max_size: int, seed: int) -> bytes:
        random_ = random.Random(seed)
        if random_.random() >= BYTEWISE:
            # What is no JSON is changed as bytes.
            with suppress(ValueError, RecursionError, OverflowError):
                changed = CHANGES[target](data, random_)
                return changed if len(changed) <= max_size else data[:max_size]
        return bytes(atheris.Mutate(data, len(data)))

    findings = HERE / "corpus" / target
    findings.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as grown:
        options = [
            f"-max_total_time={seconds}",
            f"-rss_limit_mb={memory_mb}",
            "-timeout=20",
            "-max_len=16384",
            "-print_final_stats=1",
            f"-artifact_prefix={findings}/",
        ]
        atheris.Setup(
            [sys.argv[0], *options, grown, str(HERE / "seeds" / target), str(findings)],
            TARGETS[target],
            custom_mutator=change,
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
