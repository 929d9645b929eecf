"""The method on a GPU beside the CPU, and what pruning is worth on a model of Llama-3.1-8B's shape.

    python benchmarks/gpu.py
    python benchmarks/gpu.py walk speed --device cpu --size toy --out FOLDER
    python benchmarks/gpu.py job

For a machine with a GPU that has torch, transformers, safetensors, accelerate and peft, this repository's files and no
network; the project need not be installed. All parts together take less than ten minutes on an H100. `walk`, `search`,
`merging`, `healing` and `export` compare the device with the CPU on the reference model; `round`, `speed` and
`prompts` time a model of 8 billion random weights, which are made on the device. `job`, which runs only where it is
named, takes such a model through all stages of a job; for it pydantic and psutil have to be there too, three minutes,
and 60 GB of disk beside 20 GB of memory for files.

Prints Markdown as the parts end; with --out also writes it, and the figures as JSON. A part that fails, or whose
figures differ from the CPU's by more than rounding explains, does not stop the others; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

# The project may not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.device.bench import SIZES, Bench, machine
from benchmarks.device.checkpoints import export
from benchmarks.device.findings import Findings, Report
from benchmarks.device.job import job
from benchmarks.device.llama import one_round, speed
from benchmarks.device.prompts import prompts
from benchmarks.device.repairs import healing
from benchmarks.device.walks import searching, walk

PARTS: dict[str, Callable[[Bench], Findings]] = {
    "walk": walk,
    "search": searching,
    "healing": healing,
    "export": export,
    "round": one_round,
    "speed": speed,
    "prompts": prompts,
}
ON_REQUEST: dict[str, Callable[[Bench], Findings]] = {"job": job}
"""What wants more than those do."""


def examined(part: Callable[[Bench], Findings], bench: Bench) -> Findings:
    """What a part finds; what it raises is a failure."""
    start = time.perf_counter()
    try:
        # What the part before left behind. Raises where that broke the device.
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        findings = part(bench)
    except Exception:  # noqa: BLE001  (the other parts have to run)
        findings = Findings(failures=[traceback.format_exc().rstrip()])
    findings.seconds = time.perf_counter() - start
    return findings


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = PARTS | ON_REQUEST
    whole = f"of {', '.join(known)}; all but {', '.join(ON_REQUEST)} unless named"
    parser.add_argument("parts", nargs="*", metavar="PART", help=whole)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write gpu.md and gpu.json")
    args = parser.parse_args(argv)
    if unknown := [part for part in args.parts if part not in known]:
        parser.error(f"there is no part {unknown[0]!r}; the parts are {', '.join(known)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu --size toy runs everything without one")

    bench = Bench(torch.device(args.device), SIZES[args.size])
    report = Report({**machine(bench.device), "size": args.size})
    print(report.heading(), flush=True)
    for name in args.parts or PARTS:
        report.parts[name] = examined(known[name], bench)
        print(f"\n{report.parts[name].markdown(name)}", flush=True)
        if args.out is not None:
            report.write(args.out)
    return int(report.failed)


if __name__ == "__main__":
    transformers_logging.disable_progress_bar()
    sys.exit(main())
