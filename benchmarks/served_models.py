"""The checkpoints that `benchmarks/served.py` serves, with random weights, since only their shape counts for speed.

    python -m benchmarks.served_models FOLDER

Both pairs come from one Llama-shaped model of 32 blocks: `dense`, whose halves are whole, and `pruned`, whose prefill
half gives up 4 blocks and whose decode half 8. Runs where `workers` is installed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import LlamaConfig

from vllm_tests.make_pairs import Pair, random_model, write_pair
from workers.pruning.model.plan import BlockPlan

LLAMA = LlamaConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1792,
    num_hidden_layers=32,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=0,
)
PREFILL, DECODE = frozenset({22, 24, 26, 28}), frozenset({8, 14, 18, 20, 22, 24, 26, 28})
PAIRS = {
    "dense": Pair(random_model(LLAMA), BlockPlan(32), BlockPlan(32), "job_dense"),
    "pruned": Pair(random_model(LLAMA), BlockPlan(32, PREFILL), BlockPlan(32, DECODE), "job_pruned"),
}


def main() -> None:
    """Write both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    for name, pair in PAIRS.items():
        write_pair(folder / name, pair)


if __name__ == "__main__":
    main()
