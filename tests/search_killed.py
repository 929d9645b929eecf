"""Run the removal stage of a tiny job, kill it at random moments, and hold what it ends with against an unbroken run.

A script, `python -m tests.search_killed FOLDER KILLS SEED`, because it forks: every life of the stage is a process.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import SCORES
from pdtrim.contract.spec import JobSpec
from service.sources import Text
from service.storage import open_store
from tests.tiny_job import tiny_spec, write_tiny_model
from workers.stages import removal, scoring, search_state, training
from workers.stages.context import StageContext, StoredInput

PRODUCTS = ("plan.json", "search.json")
POLL_S = 0.001


def context(folder: Path, spec: JobSpec, inputs: dict[tuple[StageName, str], StoredInput]) -> StageContext:
    """A stage's surroundings without database and lease; state lives in `folder`/store."""
    return StageContext(
        job_id="job",
        spec=spec,
        source_dir=folder / "model",
        model_revision=None,
        workdir=folder / "work",
        inputs=inputs,
        store=open_store((folder / "store").as_uri()),
        state_prefix="state",
        rows=lambda: [Text(spec.data.text or "", "data.text")],
        check=lambda: None,
        publish=lambda progress, message, figures: None,
    )


def score(folder: Path, spec: JobSpec) -> dict[tuple[StageName, str], StoredInput]:
    """The scoring stage's artifacts, in the store."""
    surroundings = context(folder, spec, {})
    scoring.run(surroundings)
    stored = {}
    for name in (scoring.WINDOWS, SCORES):
        put = surroundings.store.put_file(f"scoring/{name}", surroundings.out / name)
        (surroundings.out / name).unlink()
        stored[StageName.SCORING, name] = StoredInput(f"scoring/{name}", put.sha256)
    return stored


def live(surroundings: StageContext, seconds: float | None) -> bool:
    """Run the removal stage in a fork, killed after `seconds`. Returns: whether it came to its end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            removal.run(surroundings)
            status = 0
        finally:
            os._exit(status)
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if os.WIFSIGNALED(status):
                return False
            if os.waitstatus_to_exitcode(status) != 0:
                raise SystemExit("the removal stage failed")
            return True
        if until is not None and time.monotonic() >= until:
            os.kill(child, signal.SIGKILL)
            until = None
        time.sleep(POLL_S)


def products(surroundings: StageContext) -> list[bytes]:
    """The stage's artifacts, taken out of its folder."""
    paths = [surroundings.out / name for name in PRODUCTS]
    content = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    return content


def main(folder: Path, kills: int, seed: int) -> None:
    """Prints how often the stage was killed and how often it came to its end."""
    torch.set_num_threads(1)
    # A life killed while it draws leaves the bars' lock, which forks share, locked for ever.
    disable_progress_bar()
    search_state.SAVE_INTERVAL_S = training.SAVE_INTERVAL_S = 0.0
    search: dict[str, Any] = {"evaluations": 40}
    calibration = {"windows": 12, "window_tokens": 32}  # enough for races
    model = write_tiny_model(folder / "model", blocks=7)
    spec = JobSpec.model_validate(tiny_spec(model, search=search, calibration=calibration, seed=3))
    surroundings = context(folder, spec, score(folder, spec))
    state = folder / "store" / "state"

    removal.run(surroundings)  # warms up what every life inherits
    products(surroundings)
    shutil.rmtree(state)
    started = time.monotonic()
    live(surroundings, None)
    unbroken_s = time.monotonic() - started
    unbroken = products(surroundings)

    rng, killed, ended = random.Random(seed), 0, 0
    shutil.rmtree(state)
    resumed = 0
    while killed < kills or not ended:
        resumed += state.exists()
        if live(surroundings, rng.uniform(0.0, 0.5 * unbroken_s) if killed < kills else None):
            ended += 1
            if products(surroundings) != unbroken:
                raise SystemExit("the plan differs from the unbroken run's")
            shutil.rmtree(state)
        else:
            killed += 1
    print(f"killed {killed} times, resumed {resumed} times, ended {ended} times")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
