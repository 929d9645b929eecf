"""A rank of healing that saves its state after every step: `python -m tests.healing_rank FOLDER MODEL`."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from workers.stages import healing_rank, training

if __name__ == "__main__":
    disable_progress_bar()
    training.SAVE_INTERVAL_S = 0.0
    healing_rank.main(Path(sys.argv[1]), Path(sys.argv[2]))
