"""What estimates say of five jobs, held against what these jobs take.

    make build/real/.ready
    python -m benchmarks.estimates --folder build/estimates

Every stage runs in a process of its own, as a worker's first, and Linux is asked for the most memory that was resident
in it, mapped files included. What was measured stays in the folder and is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.estimate_jobs import JOBS, MeasuredJob, documents_of, model_of
from pdtrim.contract.jobs import RESULTS, StageName
from pdtrim.contract.spec import JobSpec

STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Measured:
    """What a stage took."""

    seconds: float
    processor_seconds: float
    resident: int
    """Bytes, the most at one time."""
    block_tokens: int
    """Tokens times blocks, forwards alone, a recomputed one counted again."""
    result: Mapping[str, Any]


def spec_of(job: MeasuredJob, folder: Path) -> JobSpec:
    """The job as somebody would submit it."""
    source = "reference" if job.model == "reference" else f"file://{model_of(job, folder).resolve()}"
    return JobSpec.model_validate({"model": source, **job.spec})


def measured(name: str, folder: Path) -> dict[StageName, Measured]:
    """What each stage of a job takes, the files of which lie in `folder`."""
    model_of(JOBS[name], folder)
    found: dict[StageName, Measured] = {}
    for stage in StageName:
        kept = folder / name / f"{stage}.json"
        if not kept.exists():
            command = [sys.executable, "-m", "benchmarks.estimates", "--folder", str(folder), "--stage", name, stage]
            # On one thread seconds of the processor are those of a machine that does nothing else.
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        found[stage] = Measured(**json.loads(kept.read_text()))
    return found


def run_stage(name: str, stage: StageName, folder: Path) -> None:
    """Run one stage in this process, after those before it, and write down what it took."""
    from benchmarks.whole_jobs import WholeJob

    job = JOBS[name]
    whole = WholeJob(spec_of(job, folder), model_of(job, folder), documents_of(job), folder / name)
    for before in list(StageName)[: list(StageName).index(stage)]:
        kept = json.loads((folder / name / f"{before}.json").read_text())
        whole.results[before] = RESULTS[before].model_validate(kept["result"])
    with _counting() as tokens:
        whole.run([stage])
    usage = resource.getrusage(resource.RUSAGE_SELF)
    took = Measured(
        seconds=whole.seconds[stage],
        processor_seconds=usage.ru_utime + usage.ru_stime,
        resident=peak_resident_bytes(),
        block_tokens=tokens[0],
        result=whole.results[stage].model_dump(mode="json"),
    )
    (folder / name / f"{stage}.json").write_text(json.dumps(asdict(took), indent=2))


@contextmanager
def _counting() -> Iterator[list[int]]:
    """Counts the tokens that go through decoder blocks meanwhile."""
    from torch import nn

    seen = [0]

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if type(module).__name__.endswith("DecoderLayer"):
            hidden = output[0] if isinstance(output, tuple) else output
            seen[0] += hidden.shape[0] * hidden.shape[1]

    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


def peak_resident_bytes() -> int:
    """The most that was resident in this process; `getrusage` would also count the one that forked it."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/estimates"), help="where jobs' files are kept")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--stage", nargs=2, metavar=("JOB", "STAGE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        run_stage(args.stage[0], StageName(args.stage[1]), args.folder)
        return
    for name in args.jobs:
        start = time.monotonic()
        for stage, took in measured(name, args.folder).items():
            print(
                f"{name} {stage}: {took.seconds:.1f} s, {took.processor_seconds:.1f} s of processor, "
                f"{took.resident / 1e6:.0f} MB, {took.block_tokens}",
                flush=True,
            )
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
