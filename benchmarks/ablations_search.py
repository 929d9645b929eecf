"""What parts of the search buy: racing, held hidden states, the bound on perplexity."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import median

from rich.progress import track
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.search import BATCH, CHUNK_WINDOWS, REFERENCE, reference_model
from workers.inputs.models import ANCHOR_BYTES
from workers.pruning.model.blocks import BlockStack, block_stack
from workers.pruning.model.calibration import Split, cut_windows, stdlib_documents, token_stream
from workers.pruning.model.units import NOTHING, Units, deleting
from workers.pruning.search.ascent import Acceptable
from workers.pruning.search.engine import Objective, WholeEngine
from workers.pruning.search.memo import MeasuredSet, Memo
from workers.pruning.search.perplexity_bound import PerplexityBound
from workers.pruning.search.scores import block_scores
from workers.pruning.search.search import Algorithm, search

WINDOW_TOKENS = 256


@dataclass(frozen=True)
class Case:
    """A search from nothing."""

    copies: int
    """How often each block of the reference model runs."""
    windows: int
    remove: int
    algorithm: Algorithm
    draw: int = 0
    """Seed of the windows and of the search."""
    racing: bool = True
    anchor_bytes: int = ANCHOR_BYTES
    evaluations: int = 150

    def __str__(self) -> str:
        return f"{12 * self.copies}/{self.remove} | {self.windows} | {self.algorithm}"


@dataclass(frozen=True)
class Ran:
    """What a search came to and took."""

    best: MeasuredSet
    frontier: tuple[Units, ...]
    sets: int
    """Measured, if only in part."""
    whole: int
    """Of these, measured on all windows."""
    block_forwards: int
    seconds: float
    """Of processor time."""


@cache
def stream(split: Split) -> Tensor:
    """All tokens of a split (tokens,)."""
    return token_stream(stdlib_documents(split), AutoTokenizer.from_pretrained(REFERENCE))


def cut(split: Split, count: int, seed: int = 0) -> Tensor:
    """Windows (windows, tokens) of the reference model's own text."""
    return cut_windows(stream(split), count=count, tokens=WINDOW_TOKENS, seed=seed)


@cache
def stack_of(copies: int) -> BlockStack:
    """The reference model's blocks; each `copies` times in a row."""
    return block_stack(reference_model(copies))


def run(case: Case) -> Ran:
    """Search, and count what that takes. Scores, which are the same for all ways of searching, are not counted."""
    stack, windows = stack_of(case.copies), cut("calibration", case.windows, case.draw)
    scores = block_scores(stack, windows, chunk_windows=CHUNK_WINDOWS).cosine
    started = time.process_time()
    engine = WholeEngine(stack, windows, "kl", chunk_windows=CHUNK_WINDOWS, anchor_bytes=case.anchor_bytes)
    memo = Memo(engine.window_losses, engine.windows, racing=case.racing, anchor=engine.anchor)
    result = search(
        memo,
        algorithm=case.algorithm,
        num_blocks=len(stack.blocks),
        remove=case.remove,
        base=NOTHING,
        scores=scores,
        evaluations=case.evaluations,
        seed=case.draw,
        on_progress=lambda done, best: None,
    )
    seconds = time.process_time() - started
    frontier = tuple(found.units for _, found in sorted(result.frontier.items()))
    best = result.frontier[case.remove]
    return Ran(best, frontier, len(memo.asked), len(memo.visited), engine.block_forwards, seconds)


def beside(cases: Sequence[Case], without: Callable[[Case], Case], draws: int, description: str) -> list[str]:
    """Each case beside itself without a part, on as many draws of windows; which goes first changes with the draw."""
    lines = [
        "| blocks/removed | windows | algorithm | block-forwards without | with | ratio | seconds without | with "
        "| ratio: median (least to most) | sets of all counts the same | loss without | with |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    done: dict[Case, Ran] = {}
    turns = [(case, replace(case, draw=draw)) for case in cases for draw in range(draws)]
    for _, drawn in track(turns, description=description):
        for turn in [drawn, without(drawn)][:: 1 if drawn.draw % 2 else -1]:
            done[turn] = run(turn)
    for case in cases:
        drawn_cases = [replace(case, draw=draw) for draw in range(draws)]
        pairs = [(done[without(drawn)], done[drawn]) for drawn in drawn_cases]
        forwards = [median(pair[side].block_forwards for pair in pairs) for side in (0, 1)]
        seconds = [median(pair[side].seconds for pair in pairs) for side in (0, 1)]
        losses = [" ".join(f"{pair[side].best.loss:.4f}" for pair in pairs) for side in (0, 1)]
        ratios = [part.seconds / none.seconds for none, part in pairs]
        same = [here == there for none, part in pairs for here, there in zip(none.frontier, part.frontier, strict=True)]
        lines.append(
            f"| {case} | {forwards[0]:.0f} | {forwards[1]:.0f} | {forwards[1] / forwards[0]:.2f} "
            f"| {seconds[0]:.1f} | {seconds[1]:.1f} | {spread(ratios)} | {sum(same)} of {len(same)} "
            f"| {losses[0]} | {losses[1]} |"
        )
    return lines


def spread(values: Sequence[float]) -> str:
    """Median (least to most)."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def racing(draws: int) -> list[str]:
    """Greedy, whose steps are races."""
    cases = [
        Case(1, 32, 4, "greedy"),
        Case(2, 16, 4, "greedy"),
    ]
    return beside(cases, lambda case: replace(case, racing=False), draws, "racing")


def anchor(draws: int) -> list[str]:
    """Hidden states of the set that a search moves from, held or not."""
    cases = [Case(1, 8, 4, "greedy"), Case(2, 8, 4, "greedy"), Case(2, 8, 4, "annealing")]
    return beside(cases, lambda case: replace(case, anchor_bytes=0), draws, "anchor")


@dataclass
class Table:
    """Losses on all windows by objective, each measured when it is first asked for."""

    engine: WholeEngine
    known: dict[tuple[Objective, Units], list[float]] = field(default_factory=dict)

    def memo(self, objective: Objective) -> Memo:
        """What a search asks; races are not run, as a set here is known on all windows or on none."""

        def losses(candidates: Sequence[Units], windows: range) -> dict[Units, list[float]]:
            new = [candidate for candidate in candidates if (objective, candidate) not in self.known]
            for start in range(0, len(new), BATCH):
                found = self.engine.window_losses(new[start : start + BATCH], range(self.engine.windows), objective)
                self.known |= {(objective, candidate): by_window for candidate, by_window in found.items()}
            return {
                candidate: self.known[objective, candidate][windows.start : windows.stop] for candidate in candidates
            }

        return Memo(losses, self.engine.windows)


def bound(seeds: int) -> list[str]:
    """The most blocks within a bound: those there are, those that the bounded search finds, and those of the frontier
    of a search by count; beside them the search by the count that the bound found, as if one had known."""
    stack, windows, most = stack_of(1), cut("calibration", 8), 5
    scores = block_scores(stack, windows, chunk_windows=CHUNK_WINDOWS).cosine
    table = Table(WholeEngine(stack, windows, "kl", chunk_windows=CHUNK_WINDOWS))
    true = table.memo("cross_entropy")
    counts = range(most + 1)
    true([deleting(chosen) for n in counts for chosen in itertools.combinations(range(len(scores)), n)])
    dense = true.best(0).loss

    def searched(seed: int, remove: int, acceptable: Acceptable | None = None) -> tuple[Memo, dict[int, MeasuredSet]]:
        memo = table.memo("kl")
        result = search(
            memo,
            algorithm="annealing",
            num_blocks=len(scores),
            remove=remove,
            base=NOTHING,
            scores=scores,
            evaluations=150,
            seed=seed,
            on_progress=lambda done, best: None,
            acceptable=acceptable,
        )
        return memo, dict(result.frontier)

    lines = [
        f"Dense cross-entropy {dense:.3f}. Sets measured: by KL + by cross-entropy, median over {seeds} seeds.",
        "",
        "| bound | most blocks there are | within the best set's increase | bounded search: blocks | sets "
        "| search to 6, then its frontier: blocks | sets | search by the found count: sets |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for allowed in track((0.03, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6), description="bound"):
        exact = PerplexityBound(true, dense, allowed, range(true.windows))
        there = max(n for n in counts if exact.holds(true.best(n)))
        bounded, by_frontier, known = [], [], []
        for seed in range(seeds):
            cross_entropy = table.memo("cross_entropy")
            held = PerplexityBound(cross_entropy, dense, allowed, range(cross_entropy.windows))
            held.increase(NOTHING)
            memo, found = searched(seed, len(scores) - 1, held.holds)
            chosen = held.largest(memo, smallest=found[0])
            bounded.append((len(chosen.units), len(memo.asked), len(held.cross_entropy.asked)))

            cross_entropy = table.memo("cross_entropy")
            read = PerplexityBound(cross_entropy, dense, allowed, range(cross_entropy.windows))
            memo, found = searched(seed, 6)
            kept = max(n for n, best in found.items() if read.holds(best))
            by_frontier.append((kept, len(memo.asked), len(read.cross_entropy.asked)))

            memo, _ = searched(seed, len(chosen.units))
            known.append(len(memo.asked))
        lines.append(
            f"| +{allowed:.0%} | {there} | +{exact.increase(true.best(there).units):.1%} | {_blocks(bounded)} "
            f"| {_sets(bounded)} | {_blocks(by_frontier)} | {_sets(by_frontier)} | {median(known):.0f} |"
        )
    return lines


def _blocks(runs: Sequence[tuple[int, int, int]]) -> str:
    counts = sorted({blocks for blocks, _, _ in runs})
    return ", ".join(f"{count} ({sum(blocks == count for blocks, _, _ in runs)}×)" for count in counts)


def _sets(runs: Sequence[tuple[int, int, int]]) -> str:
    return f"{median(kl for _, kl, _ in runs):.0f} + {median(ce for _, _, ce in runs):.0f}"
