"""The checkpoints that `benchmarks/skipping.py` serves, with random weights, since only their shape counts for speed.

    python -m benchmarks.skipping_models FOLDER

One Llama-shaped model of 32 blocks, of which 8 give up a part. Runs where `workers` is installed.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

from benchmarks.served_models import LLAMA
from vllm_tests.make_pairs import Pair, random_model, write_pair
from workers.pruning.model.plan import BlockPlan, Part

LONG = copy.deepcopy(LLAMA)
LONG.max_position_embeddings = 4096
BLOCKS = (16, 18, 20, 22, 24, 26, 28, 30)


def gives_up(part: Part) -> BlockPlan:
    return BlockPlan(32, parts=dict.fromkeys(BLOCKS, part))


WHOLE = BlockPlan(32)
PAIRS = {
    "kv_only": Pair(random_model(LONG), gives_up("kv_only"), WHOLE, "job_kv_only"),
    "mlp": Pair(random_model(LONG), gives_up("mlp"), WHOLE, "job_mlp"),
    "attention": Pair(random_model(LONG), WHOLE, gives_up("attention"), "job_attention"),
}


def main() -> None:
    """Write them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    for name, pair in PAIRS.items():
        write_pair(folder / name, pair)


if __name__ == "__main__":
    main()
