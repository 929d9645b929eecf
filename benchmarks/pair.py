"""What blocks cost in both halves and in decode alone, and a nested pair beside its controls.

    python benchmarks/pair.py --prefill 3 --decode 5

The first table removes one block of the reference model at a time, the second as many as asked for, by the search of a
job. All losses are those of continuations: prompts are half of each window. Not healed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import workers
from workers.pruning.model.blocks import BlockStack, block_stack
from workers.pruning.model.calibration import Split, cut_windows, stdlib_documents, token_stream
from workers.pruning.model.pair import FirstToken
from workers.pruning.model.units import NOTHING, Units, blocks_of, deleting, kept_for_cache
from workers.pruning.search.engine import ChunkedEngine, Objective, PairEngine, WholeEngine
from workers.pruning.search.memo import Memo
from workers.pruning.search.scores import block_scores
from workers.pruning.search.search import search

REFERENCE = Path(workers.__file__).parent / "reference_model"
CHUNK_WINDOWS = 4


class Pairs:
    """Engines of pairs on one split of the text."""

    def __init__(self, stack: BlockStack, windows: Tensor, objective: Objective, first_token: FirstToken) -> None:
        self.windows = windows
        self._stack = stack
        self._objective = objective
        self._first_token = first_token

    def engine(self, prefill: Units) -> PairEngine:
        """With a prefill model that gave up `prefill`."""
        return PairEngine(
            self._stack,
            self.windows,
            self._objective,
            prefill=prefill,
            prompt_tokens=self.windows.shape[1] // 2,
            first_token=self._first_token,
            chunk_windows=CHUNK_WINDOWS,
        )

    def loss(self, prefill: Units, decode: Units) -> float:
        """Of continuations by a pair."""
        return self.engine(prefill).losses([decode])[decode]


def best(engine: ChunkedEngine, scores: Sequence[float], remove: int, base: Units, seed: int) -> Units:
    """What the default search removes."""
    return (
        search(
            Memo(engine.window_losses, engine.windows, racing=True),
            algorithm="annealing",
            num_blocks=len(scores),
            remove=remove,
            base=base,
            scores=scores,
            evaluations=150,
            seed=seed,
            on_progress=lambda done, best: None,
        )
        .frontier[remove]
        .units
    )


def sensitivity(pairs: Pairs, num_blocks: int, progress: Progress) -> list[str]:
    """The table of single blocks."""
    dense = pairs.loss(NOTHING, NOTHING)
    lines = [
        f"Dense: {dense:.4f}.",
        "",
        "| block | in both halves | more | in decode only | more |",
        "|---|---|---|---|---|",
    ]
    for block in progress.track(range(num_blocks), description="single blocks"):
        one = deleting({block})
        both, decode = pairs.loss(one, one), pairs.loss(NOTHING, one)
        lines.append(f"| {block} | {both:.4f} | {both - dense:+.4f} | {decode:.4f} | {decode - dense:+.4f} |")
    return lines


def controls(calibration: Pairs, validation: Pairs, stack: BlockStack, args: argparse.Namespace) -> list[str]:
    """The table of the pair and what it is held against."""
    scores = block_scores(stack, calibration.windows, chunk_windows=CHUNK_WINDOWS).cosine
    whole = WholeEngine(stack, calibration.windows, args.objective, chunk_windows=CHUNK_WINDOWS)
    prefill = best(whole, scores, args.prefill, NOTHING, args.seed)
    decode = best(calibration.engine(prefill), scores, args.decode, prefill, args.seed)
    projecting = kept_for_cache(blocks_of(prefill))
    free = best(calibration.engine(projecting), scores, args.decode, NOTHING, args.seed)
    rows = {
        "dense": (NOTHING, NOTHING),
        "the nested pair": (prefill, decode),
        "its decode set in both halves": (decode, decode),
        "its decode set in decode only": (NOTHING, decode),
        "not nested: prefill projects what it skips": (projecting, free),
    }
    lines = ["| | prefill without | decode without | calibration | validation |", "|---|---|---|---|---|"]
    for name, (before, after) in rows.items():
        losses = (pairs.loss(before, after) for pairs in (calibration, validation))
        cells = [name, shown(before), shown(after), *(f"{loss:.4f}" for loss in losses)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def shown(units: Units) -> str:
    return ", ".join(str(unit.block) for unit in sorted(units)) or "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prefill", type=int, default=3, metavar="N", help="blocks that prefill gives up")
    parser.add_argument("--decode", type=int, default=5, metavar="N", help="blocks that decode gives up")
    parser.add_argument("--objective", choices=["kl", "cross_entropy", "hidden"], default="cross_entropy")
    parser.add_argument("--first-token", choices=["decode", "prefill"], default="decode", help="the half that says it")
    parser.add_argument("--calibration-windows", type=int, default=24)
    parser.add_argument("--validation-windows", type=int, default=48)
    parser.add_argument("--window-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    model = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
    model.eval().requires_grad_(False)
    stack = block_stack(model)

    def pairs(split: Split, count: int) -> Pairs:
        stream = token_stream(stdlib_documents(split), tokenizer)
        windows = cut_windows(stream, count=count, tokens=args.window_tokens, seed=args.seed)
        return Pairs(stack, windows, args.objective, args.first_token)

    calibration = pairs("calibration", args.calibration_windows)
    validation = pairs("validation", args.validation_windows)
    with Progress(transient=True) as progress:
        lines = sensitivity(calibration, len(stack.blocks), progress)
        progress.add_task("the pair and its controls", total=None)
        lines += ["", *controls(calibration, validation, stack, args)]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
