"""PDTrim beside published methods on the reference model: what each removes, at what loss, before and after training.

    python benchmarks/peers.py --removed 1 2 3 4 5 --heal-tokens 131072

All methods see the same calibration windows. With --heal-tokens all train on as many tokens, too, in two ways: on the
dense model's predictions alone (KL), and as this service distils (KL, and the hidden states between the kept blocks). A
method that first fits blocks to stand for removed ones (LLM-Streamline's replacement) spends --fit-share of the tokens
there and the rest on healing. The search is that of a job with one unified checkpoint.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import workers
from benchmarks.peer_methods import PEERS, PeerPlan
from benchmarks.spans import fit_runs
from workers.pruning.model.blocks import BlockStack, block_stack, drop_blocks
from workers.pruning.model.calibration import Split, cut_windows, stdlib_documents, token_stream
from workers.pruning.model.measure import perplexity
from workers.pruning.model.units import NOTHING, deleting
from workers.pruning.repair.distill import HEALING, heal, load_tensors, trainable
from workers.pruning.repair.losses import LossWeights
from workers.pruning.repair.training import Journal, TrainingSettings
from workers.pruning.search.engine import WholeEngine
from workers.pruning.search.memo import Memo
from workers.pruning.search.scores import block_scores
from workers.pruning.search.search import search

REFERENCE = Path(workers.__file__).parent / "reference_model"
CHUNK_WINDOWS = 4
HELD_OUT_WINDOWS = 8
PDTRIM = "PDTrim"
WAYS = (LossWeights(hidden=0.0), HEALING)


@dataclass(frozen=True)
class Row:
    """One method at one count."""

    method: str
    plan: PeerPlan
    seconds: float
    """Wall time of choosing the blocks."""


def load() -> PreTrainedModel:
    """A fresh float32 copy of the reference model."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
    model.eval().requires_grad_(False)
    return model


def training(tokens: int, args: argparse.Namespace) -> TrainingSettings:
    """Training on so many tokens."""
    steps = max(1, tokens // (args.batch_windows * args.window_tokens))
    return TrainingSettings(steps, args.batch_windows, args.learning_rate, args.seed)


def pdtrim(stack: BlockStack, windows: Mapping[Split, Tensor], remove: int, args: argparse.Namespace) -> PeerPlan:
    """The project's own choice, by annealing."""
    num_blocks, calibration = len(stack.blocks), windows["calibration"]
    scores = block_scores(stack, calibration, chunk_windows=CHUNK_WINDOWS)
    engine = WholeEngine(stack, calibration, args.objective, chunk_windows=CHUNK_WINDOWS)
    found = search(
        Memo(engine.window_losses, engine.windows, racing=True),
        algorithm="annealing",
        num_blocks=num_blocks,
        remove=remove,
        base=NOTHING,
        scores=scores.cosine,
        evaluations=args.evaluations,
        seed=args.seed,
        on_progress=lambda done, best: None,
    )
    block_forwards_of_one_pass = num_blocks * math.ceil(len(calibration) / CHUNK_WINDOWS)
    passes = math.ceil(engine.block_forwards / block_forwards_of_one_pass)
    # Scoring ran every block twice: as itself, and as the stand-in for its neighbour.
    return PeerPlan(found.frontier[remove].blocks, passes + 2)


def choose(
    stack: BlockStack, windows: Mapping[Split, Tensor], remove: int, method: str, args: argparse.Namespace
) -> Row:
    """Run one method from nothing, so that its time is its own."""
    start = time.perf_counter()
    if method == PDTRIM:
        plan = pdtrim(stack, windows, remove, args)
    else:
        plan = PEERS[method](stack, windows["calibration"], remove, chunk_windows=CHUNK_WINDOWS)
    return Row(method, plan, time.perf_counter() - start)


def distilled(
    dense: PreTrainedModel,
    plan: PeerPlan,
    windows: Mapping[Split, Tensor],
    losses: LossWeights,
    args: argparse.Namespace,
) -> PreTrainedModel:
    """The pruned model after its share of fitting, if it has spans to fit, and of healing."""

    fit_tokens = round(args.heal_tokens * args.fit_share) if plan.spans else 0
    held_out = windows["calibration"][:HELD_OUT_WINDOWS]
    weights = load()
    if plan.spans:
        tensors, _ = fit_runs(
            dense,
            plan.spans,
            frozen=set(),
            windows=windows["train"],
            held_out=held_out,
            settings=training(fit_tokens, args),
            journal=Journal(),
        )
        load_tensors(weights, tensors)
    student = drop_blocks(weights, plan.removed)
    kept = [block for block in range(dense.config.num_hidden_layers) if block not in plan.removed]
    heal(
        student,
        dense,
        kept,
        trainable(weights, kept, frozen=set()),
        losses=losses,
        windows=windows["train"],
        held_out=held_out,
        settings=training(args.heal_tokens - fit_tokens, args),
        journal=Journal(),
    )
    return student


def shown(model: PreTrainedModel, windows: Tensor) -> str:
    measured = perplexity(model, windows, batch=8)
    return str(measured)


def cells(row: Row, loss: float, perplexities: Sequence[str]) -> str:
    """One row of the table."""
    spans = ", ".join(f"{block} for {first}–{last}" for block, (first, last) in sorted(row.plan.spans.items()))
    values = (
        len(row.plan.removed),
        row.method,
        ", ".join(map(str, sorted(row.plan.removed))),
        spans or "–",
        row.plan.forwards,
        f"{row.seconds:.1f}",
        f"{loss:.3f}",
        *perplexities,
    )
    return f"| {' | '.join(map(str, values))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--removed", type=int, nargs="+", default=[1, 2, 3, 4, 5], metavar="N", help="numbers of blocks to remove"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[PDTRIM, *PEERS],
        default=[PDTRIM, *PEERS],
        metavar="METHOD",
        help=f"of {', '.join([PDTRIM, *PEERS])}",
    )
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--validation-windows", type=int, default=48)
    parser.add_argument("--window-tokens", type=int, default=256)
    parser.add_argument("--heal-tokens", type=int, default=0, help="training tokens for each method; 0 trains none")
    parser.add_argument("--fit-share", type=float, default=0.1, help="part of them that fits blocks for spans")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-windows", type=int, default=4)
    parser.add_argument("--threshold", type=float, default=0.95, help="cosine from which PDTrim deletes outright")
    parser.add_argument(
        "--objective",
        choices=["kl", "cross_entropy", "hidden"],
        default="kl",
        help="what PDTrim's search lowers; SLEB and PPL lower cross-entropy",
    )
    parser.add_argument("--evaluations", type=int, default=150, help="sets that PDTrim's annealing may visit")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    counts: dict[Split, int] = {
        "calibration": args.calibration_windows,
        "validation": args.validation_windows,
        "train": args.heal_tokens // args.window_tokens + 1,
    }
    windows = {
        split: cut_windows(
            token_stream(stdlib_documents(split), tokenizer), count=count, tokens=args.window_tokens, seed=args.seed
        )
        for split, count in counts.items()
    }
    dense = load()
    stack = block_stack(dense)
    cross_entropy = WholeEngine(stack, windows["calibration"], "cross_entropy", chunk_windows=CHUNK_WINDOWS)
    lines = [
        f"Dense: calibration loss {cross_entropy.losses([NOTHING])[NOTHING]:.3f}, "
        f"validation perplexity {shown(dense, windows['validation'])}.",
        "",
        "| n | method | removed | trained to stand for | forwards | seconds | calibration loss | pruned | healed by KL "
        "| distilled |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    perplexities: dict[object, list[str]] = {}  # methods that agree on what to remove are trained once
    jobs = [(remove, method) for remove in args.removed for method in args.methods]
    for remove, method in track(jobs, description="comparing"):
        row = choose(stack, windows, remove, method, args)
        removed = row.plan.removed
        loss = cross_entropy.losses([deleting(removed)])[deleting(removed)]
        key = (removed, tuple(row.plan.spans.items()))
        if key not in perplexities:
            models = [drop_blocks(dense, removed)]
            if args.heal_tokens:
                models += [distilled(dense, row.plan, windows, losses, args) for losses in WAYS]
            perplexities[key] = [shown(model, windows["validation"]) for model in models]
        lines.append(cells(row, loss, perplexities[key]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
