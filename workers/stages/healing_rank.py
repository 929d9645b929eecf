"""One of the processes by which a job is healed on several devices.

`torchrun … -m workers.stages.healing_rank FOLDER MODEL`, on one machine or several. What `FOLDER` has, which all ranks
see, `healing_folder.py` says; `MODEL` is the folder of the dense model. The same command goes on from the newest
states, with as many ranks as there are then.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Thread

from transformers.utils.logging import disable_progress_bar

from pdtrim.contract.spec import JobSpec
from service.stopping import go_on
from service.storage import open_store
from workers.pruning.repair.sharded import Ranks, joined
from workers.stages.context import Figure, StageContext, StoredInput
from workers.stages.healing_folder import Failure, HealingFolder, Limits, Progress, read, write
from workers.stages.sharded_healing import heal

WATCH_S = 1.0
log = logging.getLogger(__name__)


def main(folder: Path, model: Path) -> None:
    """Heal as rank of a group that torchrun's environment describes."""
    Thread(target=_end_with, args=(os.getppid(),), name="parent", daemon=True).start()
    shared, rank = HealingFolder(folder), int(os.environ["RANK"])
    try:
        with joined() as ranks:
            if ranks.speaks:
                shared.tidy()
            ranks.first_says(0)  # Nobody reads or writes before.
            found = heal(_context(shared, model, ranks), shared, ranks)
            ranks.least(0)
            if ranks.speaks:
                write(shared.result, found)
    except Exception as error:
        log.error("rank %d failed", rank, exc_info=error)
        write(shared.failed(rank), Failure.of(error))
        logging.shutdown()
        # At once: a thread that saves may wait for ranks that are no more.
        os._exit(1)


def _end_with(parent: int) -> None:
    """A rank whose stage or torchrun was killed would keep its device for ever."""
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    os._exit(1)


def _context(shared: HealingFolder, model: Path, ranks: Ranks) -> StageContext:
    """A stage's surroundings without database, lease and store. Rank 0 alone says how far it is."""

    def publish(progress: float, message: str, figures: Mapping[str, Figure]) -> None:
        if ranks.speaks:
            write(shared.progress, Progress(progress=progress, message=message, figures=dict(figures)))
            log.info("%.0f %% %s %s", 100 * progress, message, dict(figures))

    limits = read(shared.limits, Limits) or Limits()
    return StageContext(
        job_id="",
        spec=JobSpec.model_validate_json(shared.job.read_bytes()),
        source_dir=model,
        model_revision=None,
        workdir=shared.path,
        # They lie where the context would download them to.
        inputs=dict.fromkeys(shared.inputs(), StoredInput("", "")),
        store=open_store(shared.states.absolute().as_uri()),
        state_prefix="",
        rows=lambda: None,
        check=go_on,
        publish=publish,
        memory_bytes=limits.memory_bytes,
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    disable_progress_bar()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
