"""How good the default search's sets are, and how soon it has them: beside every set there is, and beside SLEB.

    python benchmarks/search.py optimum --removed 5 --seeds 20
    python benchmarks/search.py sleb --removed 2 4 6 --copies 2
    python benchmarks/search.py parts --copies 2 --removed 4 6 8 --calibration-windows 12 --window-tokens 64
    python benchmarks/search.py parts --made-up 30 --removed 4 6 9
    python -m benchmarks.search sleb --removed 3 6 9 --precision bfloat16 \
        --model build/real/smollm2-135m-instruct --text build/real/brown.jsonl

`optimum` measures every set of up to --removed blocks, then lets the search of each seed find its way with those
losses. `sleb` times SLEB's procedure and, from nothing, the search until its best set of as many blocks costs no more
by --objective, which the search lowers; SLEB always lowers cross-entropy. The model is the reference model unless
--model says otherwise; with --copies 2 every block of it runs twice, at half strength. Both use the same windows in
chunks of the same size, and one thread, whose processor time is counted, so that other work on the machine does not
count.

`parts` says what greedy and annealing each take, and what annealing adds. With --made-up the losses are no model's, but
those of a formula in which blocks interact: the counts of sets are what a model of that depth would see, much the same,
and the losses mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import workers
from benchmarks.peer_methods import sleb_rounds
from pdtrim.contract.spec import SearchSpec
from workers.inputs.models import ANCHOR_BYTES, load_model
from workers.pruning.model.blocks import BlockStack, block_stack, drop_blocks
from workers.pruning.model.calibration import cut_windows, split_stream, stdlib_documents, token_stream
from workers.pruning.model.units import NOTHING, Units, blocks_of, deleting
from workers.pruning.search.ascent import OnProgress
from workers.pruning.search.engine import WholeEngine, WindowLosses, mean
from workers.pruning.search.memo import MeasuredSet, Memo
from workers.pruning.search.scores import block_scores
from workers.pruning.search.search import SearchResult, search
from workers.stages.precision import DTYPES

REFERENCE = Path(workers.__file__).parent / "reference_model"
CHUNK_WINDOWS = 4
TOLERANCE = 1e-6
"""Losses so close are equal: the procedures sum in another order."""
SHARPNESS = 4.0
"""Of the bend that keeps made-up losses above zero."""
BATCH = 64
"""Sets that share one walk when all are measured."""


class Reached(Exception):
    """The search has what it was timed for."""


def reference_model(copies: int) -> PreTrainedModel:
    """The reference model in float32; each block `copies` times in a row, adding a share of what it added alone."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
    model.eval().requires_grad_(False)
    if copies == 1:
        return model
    for block in model.model.layers:
        block.self_attn.o_proj.weight.div_(copies)
        block.mlp.down_proj.weight.div_(copies)
    model.model.layers = nn.ModuleList(copy.deepcopy(block) for block in model.model.layers for _ in range(copies))
    model.config.num_hidden_layers = len(model.model.layers)
    if kinds := getattr(model.config, "layer_types", None):
        model.config.layer_types = [kind for kind in kinds for _ in range(copies)]
    return drop_blocks(model, frozenset())  # numbers the layers anew


def default_search(
    memo: Memo,
    scores: Sequence[float],
    remove: int,
    seed: int,
    on_progress: OnProgress = lambda done, best: None,
    evaluations: int | None = None,
) -> SearchResult:
    """The search of a job that says nothing about it, but for annealing's budget where one is given."""
    return search(
        memo,
        algorithm="annealing",
        num_blocks=len(scores),
        remove=remove,
        base=NOTHING,
        scores=scores,
        evaluations=SearchSpec(evaluations=evaluations).annealing_budget(len(scores)),
        seed=seed,
        on_progress=on_progress,
    )


def optimum(stack: BlockStack, windows: Tensor, scores: Sequence[float], args: argparse.Namespace) -> list[str]:
    """The table of `optimum`."""
    engine = WholeEngine(stack, windows, "cross_entropy", chunk_windows=CHUNK_WINDOWS)
    blocks = range(len(stack.blocks))
    sets = [deleting(s) for n in range(max(args.removed) + 1) for s in itertools.combinations(blocks, n)]
    batches = [sets[start : start + BATCH] for start in range(0, len(sets), BATCH)]
    measured: dict[Units, list[float]] = {}
    for batch in track(batches, description="every set"):
        measured |= engine.window_losses(batch, range(engine.windows))
    table = mean(measured)

    def looked_up(candidates: Sequence[Units], windows: range) -> dict[Units, list[float]]:
        return {candidate: measured[candidate][windows.start : windows.stop] for candidate in candidates}

    lines = [
        f"Dense {table[NOTHING]:.3f}; {len(sets)} sets in {engine.block_forwards} block-forwards.",
        "",
        "| n | best set | loss | seeds that end on it | sets measured, if only in part: median | most |",
        "|---|---|---|---|---|---|",
    ]
    for count in args.removed:
        best = best_of(table, count)
        memos = [Memo(looked_up, engine.windows, racing=True) for _ in range(args.seeds)]
        ends = [default_search(memo, scores, count, seed).frontier[count] for seed, memo in enumerate(memos)]
        hits = sum(end.units == best.units for end in ends)
        touched = [len(memo.known) for memo in memos]
        shown = ", ".join(map(str, sorted(best.blocks)))
        lines.append(
            f"| {count} | {shown} | {best.loss:.3f} | {hits} of {args.seeds} | {median(touched):.0f} | {max(touched)} |"
        )
    return lines


def best_of(table: Mapping[Units, float], count: int) -> MeasuredSet:
    """The set of `count` blocks of least loss."""
    units = min((units for units in table if len(units) == count), key=table.__getitem__)
    return MeasuredSet(units, table[units])


def beside_sleb(stack: BlockStack, windows: Tensor, scores: Sequence[float], args: argparse.Namespace) -> list[str]:
    """The table of `sleb`."""
    lines = [
        "| n | SLEB's set | loss | seconds | search's set when no worse | loss | seconds | of SLEB's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rounds = sleb_rounds(stack, windows, chunk_windows=CHUNK_WINDOWS)
    their_seconds = 0.0
    for count in track(range(1, max(args.removed) + 1), description="beside SLEB"):
        started = time.process_time()
        theirs = deleting(next(rounds).removed)
        their_seconds += time.process_time() - started
        if count not in args.removed:
            continue
        target = WholeEngine(stack, windows, args.objective, chunk_windows=CHUNK_WINDOWS).losses([theirs])[theirs]

        found, seconds = until(stack, windows, scores, count, target, args)
        lines.append(
            f"| {count} | {', '.join(map(str, sorted(blocks_of(theirs))))} | {target:.3f} | {their_seconds:.1f} "
            f"| {', '.join(map(str, sorted(found.blocks)))} | {found.loss:.3f} | {seconds:.1f} "
            f"| {seconds / their_seconds:.2f} |"
        )
    return lines


def until(
    stack: BlockStack, windows: Tensor, scores: Sequence[float], count: int, target: float, args: argparse.Namespace
) -> tuple[MeasuredSet, float]:
    """Search until a set of `count` blocks costs at most `target`: that set, or the best there was, and the seconds."""
    started = time.process_time()

    def stop_when_reached(done: float, best: MeasuredSet | None) -> None:
        if best is not None and len(best.units) == count and best.loss <= target + TOLERANCE:
            raise Reached

    engine = WholeEngine(stack, windows, args.objective, chunk_windows=CHUNK_WINDOWS, anchor_bytes=ANCHOR_BYTES)
    memo = Memo(engine.window_losses, engine.windows, racing=True, anchor=engine.anchor)
    with contextlib.suppress(Reached):
        default_search(memo, scores, count, args.seed, stop_when_reached)
    return memo.best(count), time.process_time() - started


class MadeUp:
    """Losses without a model: a block's own cost, more where neighbours go with it, other things at random.

    Windows differ in level and, a little, in which sets they like. All is a function of set, window and seed.
    """

    def __init__(self, blocks: int, seed: int) -> None:
        rng = random.Random(seed)
        # The first and the last blocks matter most, as in trained models.
        ends = [1.0 + 8.0 * math.exp(-min(block, blocks - 1 - block)) for block in range(blocks)]
        self._own = [end * rng.lognormvariate(0.0, 0.6) / blocks for end in ends]
        self._between = {
            (one, other): rng.gauss(0.5, 3.0) * math.exp(-(other - one) / 3) / blocks
            for one, other in itertools.combinations(range(blocks), 2)
        }
        self._seed = seed

    def window_losses(self, candidates: Sequence[Units], windows: range) -> dict[Units, list[float]]:
        """As an engine's."""
        return {units: [self._loss(units, window) for window in windows] for units in candidates}

    def _loss(self, units: Units, window: int) -> float:
        gone = sorted(blocks_of(units))
        cost = sum(self._own[block] for block in gone)
        cost += sum(self._between[pair] for pair in itertools.combinations(gone, 2))
        rng = random.Random(f"{self._seed} {window}")
        level = rng.uniform(0.7, 1.3)
        liking = random.Random(f"{self._seed} {window} {gone}").gauss(0.0, 0.1)
        return level * math.log1p(math.exp(SHARPNESS * cost)) / SHARPNESS * (1.0 + liking)


def parts(losses: WindowLosses, windows: int, scores: Sequence[float], args: argparse.Namespace) -> list[str]:
    """The table of `parts`."""
    lines = [
        "| blocks | removed | budget | greedy: sets | whole evaluations | annealing: sets | whole evaluations "
        "| ended by | loss of greedy's set | of annealing's | lower by |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    known: dict[Units, list[float]] = {}  # every search asks the same model; nothing is computed twice
    cases = list(itertools.product(args.removed, args.budgets or [None], range(args.seeds)))
    for count, budget, seed in track(cases, description="parts"):
        memo = Memo(losses, windows, known, racing=True)
        greedy = search(
            Memo(losses, windows, known, racing=True),
            algorithm="greedy",
            num_blocks=len(scores),
            remove=count,
            base=NOTHING,
            scores=scores,
            evaluations=0,
            seed=seed,
            on_progress=lambda done, best: None,
        ).frontier[count]
        found = default_search(memo, scores, count, seed, evaluations=budget)
        first, then = found.efforts["greedy"], found.efforts["annealing"]
        best = found.frontier[count]
        asked = SearchSpec(evaluations=budget).annealing_budget(len(scores))
        lines.append(
            f"| {len(scores)} | {count} | {asked} | {first.sets} | {first.whole:.0f} | {then.sets} | {then.whole:.0f} "
            f"| {found.ended_by} | {greedy.loss:.4f} | {best.loss:.4f} | {1 - best.loss / greedy.loss:.1%} |"
        )
    return lines


def calibration_text(args: argparse.Namespace) -> Tensor:
    """Token ids (tokens,) of text to draw windows from."""
    if args.text is None:
        return token_stream(stdlib_documents("calibration"), AutoTokenizer.from_pretrained(REFERENCE))
    documents = (json.loads(line)["text"] for line in args.text.read_text().splitlines())
    whole = token_stream(documents, AutoTokenizer.from_pretrained(args.model))
    return split_stream(whole, tokens=args.window_tokens)["calibration"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", choices=["optimum", "sleb", "parts"])
    parser.add_argument("--removed", type=int, nargs="+", default=[1, 2, 3, 4, 5], metavar="N")
    parser.add_argument("--model", type=Path, help="a checkpoint's folder; by default the reference model, in float32")
    parser.add_argument("--text", type=Path, help="with --model: a JSON object with `text` a line")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--copies", type=int, default=1, help="how often each block of the reference model runs")
    parser.add_argument(
        "--objective", choices=["kl", "cross_entropy"], default="kl", help="by which sets are held beside SLEB's"
    )
    parser.add_argument("--seeds", type=int, default=20, help="searches of `optimum` and, for each count, of `parts`")
    parser.add_argument("--budgets", type=int, nargs="+", metavar="N", help="annealing's sets in `parts`")
    parser.add_argument("--made-up", type=int, metavar="BLOCKS", help="let `parts` search losses of no model")
    parser.add_argument("--seed", type=int, default=0, help="of the windows, and of the search beside SLEB")
    parser.add_argument("--calibration-windows", type=int, default=24)
    parser.add_argument("--window-tokens", type=int, default=256)
    args = parser.parse_args()

    torch.set_num_threads(1)
    if args.made_up is not None:
        made_up = MadeUp(args.made_up, args.seed)
        print("\n".join(parts(made_up.window_losses, args.calibration_windows, [0.0] * args.made_up, args)))
        return
    stream = calibration_text(args)
    windows = cut_windows(stream, count=args.calibration_windows, tokens=args.window_tokens, seed=args.seed)
    model = reference_model(args.copies) if args.model is None else load_model(args.model, dtype=DTYPES[args.precision])
    stack = block_stack(model)
    scores = block_scores(stack, windows, chunk_windows=CHUNK_WINDOWS).cosine
    if args.table == "parts":
        engine = WholeEngine(stack, windows, args.objective, chunk_windows=CHUNK_WINDOWS)
        lines = parts(engine.window_losses, len(windows), scores, args)
    else:
        lines = (optimum if args.table == "optimum" else beside_sleb)(stack, windows, scores, args)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
