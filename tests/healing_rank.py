"""A rank of healing that saves its state after every step: `python -m tests.healing_rank FOLDER MODEL`.

With `HOLD_AFTER_STATES` set, each half goes on after its first state only when `go-on-HALF` is in the folder: whatever
a test does then happens in the middle of healing, however busy the machine is.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from pdtrim.contract.results import Half
from workers.stages import healing_rank, training
from workers.stages.healing_folder import HealingFolder

HOLD = "HOLD_AFTER_STATES"


class HeldFolder(HealingFolder):
    """One in which a state that counts is waited after."""

    def commit(self, half: Half, step: int) -> None:
        super().commit(half, step)
        while not self.go_on(half).exists():
            time.sleep(0.02)

    def go_on(self, half: Half) -> Path:
        return self.path / f"go-on-{half}"


if __name__ == "__main__":
    disable_progress_bar()
    training.SAVE_INTERVAL_S = 0.0
    if HOLD in os.environ:
        healing_rank.HealingFolder = HeldFolder  # type: ignore[attr-defined]  # the ranks' own, in this process alone
    healing_rank.main(Path(sys.argv[1]), Path(sys.argv[2]))
