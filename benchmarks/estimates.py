"""What estimates say of five jobs, held against what these jobs take.

    make build/real/.ready
    python -m benchmarks.estimates --folder build/estimates

Every stage runs in a process of its own, as a worker's first, and Linux is asked for the most memory that was resident
in it, mapped files included. What was measured stays in the folder and is not measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.estimate_jobs import JOBS, MeasuredJob, documents_of, model_of, text_of
from benchmarks.estimate_tables import Measured, folder_bytes, of_files, of_sets, of_stages
from benchmarks.whole_jobs import WholeJob
from pdtrim.contract.estimate import Estimate
from pdtrim.contract.jobs import RESULTS, StageName
from pdtrim.contract.spec import JobSpec
from service.checking.estimate import estimate
from service.checking.placement import placed
from service.sources import describe_model
from workers.running.announcing import look, probed

STATUS = Path("/proc/self/status")


def spec_of(job: MeasuredJob, folder: Path) -> JobSpec:
    """The job as somebody would submit it."""
    source = "reference" if job.model == "reference" else f"file://{model_of(job, folder).resolve()}"
    return JobSpec.model_validate({"model": source, **text_of(job), **job.spec})


def estimated(name: str, folder: Path) -> Estimate:
    """What the service says of a job, on a worker that is this machine with one thread, by seconds of the processor."""
    speed = probed(torch.device("cpu"), time.process_time)
    device = look(folder).model_copy(update=asdict(speed))
    spec = spec_of(JOBS[name], folder)
    model = describe_model(spec.model.source)
    return estimate(spec, model, placed(spec, model, [device], ["default"]), None)


def measured(name: str, folder: Path) -> dict[StageName, Measured]:
    """What each stage of a job takes, the files of which lie in `folder`."""
    model_of(JOBS[name], folder)
    found: dict[StageName, Measured] = {}
    for stage in StageName:
        kept = folder / name / f"{stage}.json"
        if not kept.exists():
            # As the processes of a worker's pool come about: with everything imported.
            process = get_context("fork").Process(target=run_stage, args=(name, stage, folder))
            process.start()
            process.join()
            if process.exitcode:
                raise RuntimeError(f"{stage} of {name} ended with {process.exitcode}")
        found[stage] = Measured(**json.loads(kept.read_text()))
    return found


def run_stage(name: str, stage: StageName, folder: Path) -> None:
    """Run one stage in this process, after those before it, and write down what it took."""
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
        stored=folder_bytes(whole.artifacts(stage)),
        result=whole.results[stage].model_dump(mode="json"),
    )
    (folder / name / f"{stage}.json").write_text(json.dumps(asdict(took), indent=2))


@contextmanager
def _counting() -> Iterator[list[int]]:
    """Counts the tokens that go through decoder blocks meanwhile."""
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
    args = parser.parse_args()
    # On one thread seconds of the processor are those of a machine that does nothing else, and processes can fork.
    torch.set_num_threads(1)
    gc.freeze()  # As a worker's are, whose stages collect what the one before left.
    found = {name: measured(name, args.folder) for name in args.jobs}
    told = {name: estimated(name, args.folder) for name in args.jobs}
    print("| job | parameters found (estimated) | sets found (estimated) |\n|---|---|---|")
    for name in args.jobs:
        print(of_sets(JOBS[name].title, told[name], found[name]))
    print("\n| job | stage | way | MB estimated | taken | ratio | s estimated | of processor | ratio | by the clock |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in args.jobs:
        print("\n".join(of_stages(name, told[name], found[name])))
    print("\n| job | MB in the store estimated | MB found | ratio |\n|---|---|---|---|")
    for name in args.jobs:
        print(of_files(name, told[name], found[name]))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
