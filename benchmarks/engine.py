"""One round of single removals: the engine's shared walk beside a plain loop with one full forward a candidate.

    python benchmarks/engine.py --blocks 32 --repeats 5

Both run on the same random Llama and windows in one process, in turns; the table gives medians and their ratio. With
--streamed the engine also reads its blocks one at a time from a checkpoint in a temporary folder.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from workers.pruning.model.blocks import block_stack, drop_blocks
from workers.pruning.model.streaming import load_streamed
from workers.pruning.model.units import Units, blocks_of, deleting
from workers.pruning.search.engine import WholeEngine

CPU = torch.device("cpu")
Losses = dict[Units, float]


def random_llama(blocks: int, hidden: int) -> PreTrainedModel:
    """A float32 Llama of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.float().eval().requires_grad_(False)
    return model


@torch.no_grad()
def plain_loop(model: PreTrainedModel, windows: Tensor, candidates: list[Units], chunk_windows: int) -> Losses:
    """Cross-entropy of every candidate by a forward of the whole pruned model."""
    losses = {}
    for removed in candidates:
        pruned = drop_blocks(model, blocks_of(removed))
        total = 0.0
        for chunk in windows.split(chunk_windows):
            logits = pruned(input_ids=chunk[:, :-1]).logits.float()
            total += float(F.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum"))
        losses[removed] = total / windows[:, 1:].numel()
    return losses


def seconds(run: Callable[[], Losses]) -> float:
    """Wall time."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window-tokens", type=int, default=128)
    parser.add_argument("--chunk-windows", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--streamed", action="store_true", help="also with weights read from disk in every round")
    args = parser.parse_args()

    model = random_llama(args.blocks, args.hidden)
    windows = torch.randint(4096, (args.windows, args.window_tokens), generator=torch.Generator().manual_seed(0))
    candidates = [deleting({block}) for block in range(args.blocks)]
    engine = WholeEngine(block_stack(model), windows, "cross_entropy", chunk_windows=args.chunk_windows)
    ways: dict[str, Callable[[], Losses]] = {
        "plain loop": lambda: plain_loop(model, windows, candidates, args.chunk_windows),
        "engine": lambda: engine.losses(candidates),
    }
    with tempfile.TemporaryDirectory() as folder:
        if args.streamed:
            model.save_pretrained(folder)
            held, _ = load_streamed(Path(folder), dtype=torch.float32, device=CPU)
            streamed = WholeEngine(block_stack(held), windows, "cross_entropy", chunk_windows=args.chunk_windows)
            ways["engine, streamed"] = lambda: streamed.losses(candidates)

        found = {name: run() for name, run in ways.items()}  # also warms up
        forwards = {
            "plain loop": args.blocks * (args.blocks - 1),
            "engine": engine.block_forwards // -(-args.windows // args.chunk_windows),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in track(range(args.repeats), description="measuring"):
            for name, run in ways.items():
                times[name].append(seconds(run))

    plain = median(times["plain loop"])
    lines = [
        "| | block-forwards | of the loop's | seconds | of the loop's | largest difference of a loss |",
        "|---|---|---|---|---|---|",
    ]
    for name in ways:
        count = forwards.get(name, forwards["engine"])
        difference = max(abs(found[name][c] - found["plain loop"][c]) for c in candidates)
        time_taken = median(times[name])
        lines.append(
            f"| {name} | {count} | {count / forwards['plain loop']:.2f} | {time_taken:.2f} | {time_taken / plain:.2f} "
            f"| {difference:.1e} |"
        )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
