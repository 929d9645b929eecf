"""Which calibration objective ranks sets of removed blocks best by validation perplexity, and on how many windows.

    python benchmarks/objective.py --windows 16 64 256 --removed 3

Every set of up to --removed blocks of the reference model is measured by every objective and by its cross-entropy on
validation windows. The table gives, for each number of removed blocks, Spearman's rank correlation between the two and
the validation perplexity of the set that the objective finds best (in brackets: of the best set there is).
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import correlation, fmean
from typing import get_args

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import workers
from workers.pruning.model.blocks import BlockStack, block_stack, capture_calls
from workers.pruning.model.calibration import Split, cut_windows, stdlib_documents, token_stream
from workers.pruning.model.units import NOTHING, Units, deleting
from workers.pruning.search.anchor import Trail
from workers.pruning.search.engine import Objective, walk

REFERENCE = Path(workers.__file__).parent / "reference_model"
PART = 16
"""Windows measured at a time; the counts asked for are multiples of it, so that no window is measured twice."""
CHUNK_WINDOWS = 4
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
Losses = Mapping[Units, float]


def ranks(values: Sequence[float]) -> list[float]:
    """Each value's place in ascending order. Losses of different sets are never equal to the last bit."""
    order = sorted(range(len(values)), key=values.__getitem__)
    places = [0.0] * len(values)
    for place, index in enumerate(order):
        places[index] = float(place)
    return places


@torch.no_grad()
def measured(stack: BlockStack, part: Tensor, sets: Sequence[Units]) -> dict[Objective, Losses]:
    """Every objective of every set on `part` (windows, tokens), by one walk and one head."""
    inputs, targets = part[:, :-1], part[:, 1:].flatten()
    calls = capture_calls(stack, inputs)
    totals: dict[Objective, dict[Units, float]] = {name: dict.fromkeys(sets, 0.0) for name in OBJECTIVES}
    for ids, wanted in zip(inputs.split(CHUNK_WINDOWS), targets.split(CHUNK_WINDOWS * inputs.shape[1]), strict=True):
        h, _ = walk(stack, calls, Trail.starting(stack.embed(ids)), [NOTHING, *sets], {})
        dense = stack.norm(h[NOTHING].flatten(0, 1))  # (tokens, hidden)
        dense_log_p = F.log_softmax(stack.head(dense), dim=-1)  # (tokens, vocabulary)
        for removed in sets:
            normed = stack.norm(h[removed].flatten(0, 1))
            log_p = F.log_softmax(stack.head(normed), dim=-1)
            distances = (normed - dense).pow(2).sum(-1) / dense.pow(2).sum(-1)
            totals["kl"][removed] += float(F.kl_div(log_p, dense_log_p, reduction="sum", log_target=True))
            totals["cross_entropy"][removed] += float(F.nll_loss(log_p, wanted, reduction="sum"))
            totals["hidden"][removed] += float(distances.sum())
    return {
        name: {removed: total / len(targets) for removed, total in of_sets.items()} for name, of_sets in totals.items()
    }


def mean(parts: Sequence[Mapping[Objective, Losses]], objective: Objective) -> dict[Units, float]:
    """Each set's loss over all `parts`, which have equally many tokens."""
    return {removed: fmean(part[objective][removed] for part in parts) for removed in parts[0][objective]}


def row(objective: Objective, count: int, windows: int, losses: Losses, validation: Losses) -> str:
    """One line of the table, for the sets of `count` blocks."""
    sets = [removed for removed in losses if len(removed) == count]
    rho = correlation(ranks([losses[s] for s in sets]), ranks([validation[s] for s in sets]))
    chosen = min(sets, key=lambda removed: losses[removed])
    best = min(sets, key=lambda removed: validation[removed])
    return (
        f"| {count} | {objective} | {windows} | {rho:.4f} | {', '.join(map(str, sorted(chosen)))} "
        f"| {math.exp(validation[chosen]):.2f} ({math.exp(validation[best]):.2f}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--removed", type=int, default=3, help="largest number of removed blocks")
    parser.add_argument("--windows", type=int, nargs="+", default=[16, 64, 256], help=f"multiples of {PART}")
    parser.add_argument("--validation-windows", type=int, default=96)
    parser.add_argument("--window-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if any(windows % PART for windows in [*args.windows, args.validation_windows]):
        parser.error(f"numbers of windows must be multiples of {PART}")

    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    model = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
    stack = block_stack(model.eval().requires_grad_(False))
    counts: dict[Split, int] = {"calibration": max(args.windows), "validation": args.validation_windows}
    windows = {
        split: cut_windows(
            token_stream(stdlib_documents(split), tokenizer), count=count, tokens=args.window_tokens, seed=args.seed
        )
        for split, count in counts.items()
    }
    removals = range(1, args.removed + 1)
    sets = [deleting(chosen) for n in removals for chosen in itertools.combinations(range(len(stack.blocks)), n)]
    parts = {
        split: [measured(stack, part, sets) for part in track(windows[split].split(PART), description=split)]
        for split in counts
    }
    validation = mean(parts["validation"], "cross_entropy")
    lines = [
        "| removed | objective | windows | rank correlation | chosen | validation perplexity (best) |",
        "|---|---|---|---|---|---|",
    ]
    for count, objective, number in itertools.product(removals, OBJECTIVES, args.windows):
        losses = mean(parts["calibration"][: number // PART], objective)
        lines.append(row(objective, count, number, losses, validation))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
