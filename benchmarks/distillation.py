"""What distillation recovers: validation perplexity of the reference model, pruned and distilled, as a Markdown table.

    python benchmarks/distillation.py --heal-tokens 131072

The search, the healing and the data splits are those of a job with one unified checkpoint.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import workers
from workers.pruning.model.blocks import block_stack, drop_blocks
from workers.pruning.model.calibration import Split, cut_windows, stdlib_documents, token_stream
from workers.pruning.model.measure import Perplexity, perplexity
from workers.pruning.model.plan import assign_actions
from workers.pruning.model.units import NOTHING
from workers.pruning.repair.distill import heal, trainable
from workers.pruning.repair.training import Journal, TrainingSettings
from workers.pruning.search.engine import WholeEngine
from workers.pruning.search.memo import Memo
from workers.pruning.search.scores import block_scores
from workers.pruning.search.search import search

REFERENCE = Path(workers.__file__).parent / "reference_model"
COUNTS: dict[Split, int] = {"calibration": 64, "validation": 48}


def load() -> PreTrainedModel:
    """A fresh float32 copy of the reference model."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
    model.eval().requires_grad_(False)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--removed", type=int, nargs="+", default=[2, 3, 4], help="blocks to remove")
    parser.add_argument("--window-tokens", type=int, default=256)
    parser.add_argument("--heal-tokens", type=int, default=131_072)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-windows", type=int, default=4)
    parser.add_argument("--threshold", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    counts: dict[Split, int] = {**COUNTS, "train": args.heal_tokens // args.window_tokens + 1}
    windows = {
        split: cut_windows(
            token_stream(stdlib_documents(split), tokenizer), count=count, tokens=args.window_tokens, seed=args.seed
        )
        for split, count in counts.items()
    }
    dense = load()
    stack = block_stack(dense)
    scores = block_scores(stack, windows["calibration"], chunk_windows=4)
    engine = WholeEngine(stack, windows["calibration"], "kl", chunk_windows=4)
    memo = Memo(engine.window_losses, engine.windows, racing=True)
    found = search(
        memo,
        algorithm="annealing",
        num_blocks=len(stack.blocks),
        remove=max(args.removed),
        base=NOTHING,
        scores=scores.cosine,
        evaluations=150,
        seed=args.seed,
        on_progress=lambda done, best: None,
    )

    def settings(tokens: int) -> TrainingSettings:
        steps = tokens // (args.batch_windows * args.window_tokens)
        return TrainingSettings(steps, args.batch_windows, args.learning_rate, args.seed)

    def shown(model: PreTrainedModel) -> str:
        measured: Perplexity = perplexity(model, windows["validation"], batch=8)
        return str(measured)

    lines = [
        "| removed | blocks deleted | blocks distilled | dense | pruned | distilled | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for count in track(args.removed, description="distilling"):
        start = time.perf_counter()
        plan = assign_actions(
            found.frontier[count].blocks,
            num_blocks=len(stack.blocks),
            scores=scores.cosine,
            threshold=args.threshold,
            merge_errors=scores.merge_errors,
        )
        weights = load()
        student = drop_blocks(weights, plan.removed)
        pruned = shown(student)
        heal(
            student,
            dense,
            plan.kept,
            trainable(weights, plan.kept, frozen=set()),
            windows=windows["train"],
            held_out=windows["calibration"][:8],
            settings=settings(args.heal_tokens),
            journal=Journal(),
        )
        distilled = ", ".join(f"{r}→{a}" for r, a in sorted(plan.distilled.items())) or "none"
        deleted = ", ".join(map(str, sorted(plan.deleted))) or "none"
        seconds = time.perf_counter() - start
        cells = (count, deleted, distilled, shown(dense), pruned, shown(student), f"{seconds:.0f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
