"""Which search finds blocks whose loss holds on other text: what it minimises, on how much of which text, and how.

    make build/real/.ready
    python -m benchmarks.held_out --model build/real/smollm2-135m-instruct --text build/real/brown.jsonl --out FOLDER

Whole blocks that both halves give up, or blocks of prefill but their keys and values, nothing healed. Every way to
search is tried on three draws of calibration text that have no window in common. Its sets are measured as pairs are
served, as they are and folded (a matrix by least squares, of windows of the same draw), on text that no search saw:
continuations of 128 tokens, spans copied from the prompt, numbers that stand in it, and choices between continuations.
Rows go to rows.jsonl as they end; a run that was cut off goes on, and with --table the tables are made of what there
is.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks.choices import evopress
from benchmarks.folds import folded_half
from benchmarks.questions import Answers, Questions, answered, copied_spans, needles, next_passage, running_text
from benchmarks.rows import append, arguments, written
from pdtrim.contract.windows import windows_to_fold
from workers.inputs.models import device, load_model
from workers.pruning.model.blocks import block_stack
from workers.pruning.model.calibration import interleaved, said_again, split_stream, token_stream
from workers.pruning.model.parts import pruned
from workers.pruning.model.plan import BlockPlan
from workers.pruning.model.units import NOTHING, Kind, Units, blocks_of, deleting, parts_of
from workers.pruning.repair.folded_sets import FoldedSets
from workers.pruning.search.ascent import Ascent
from workers.pruning.search.engine import LossEngine, Objective, WholeEngine
from workers.pruning.search.memo import Memo
from workers.pruning.search.prefill_engine import PrefillEngine
from workers.pruning.search.scores import block_scores
from workers.pruning.search.search import search as searched
from workers.stages.precision import DTYPES

WINDOW_TOKENS, PROMPT_TOKENS = 256, 128
DRAWS = range(3)
BEAM = 4
CHUNK_WINDOWS = 16
ANCHOR_BYTES = 2**30
FOLD_TOKENS = 20_480
"""To fold what was found."""


@dataclass(frozen=True, order=True)
class Way:
    """How sets are searched."""

    algorithm: str = "greedy"
    objective: Objective = "kl"
    windows: int = 8
    scored: str = "whole"
    """Every token of a window, or its `continuation` alone."""
    copying: float = 0.0
    """Windows that say their prompt again, as a share of the others."""
    gives_up: Kind = "block"
    folded: bool = False
    """Sets are compared as they are once folded."""

    def __str__(self) -> str:
        return (
            f"{self.algorithm}{', folded' if self.folded else ''} | {self.objective} | {self.windows} | {self.scored}"
            f" | {self.copying:.0%}" + ("" if self.gives_up == "block" else f", {self.gives_up} in prefill")
        )


WAYS = (
    Way(),
    Way(copying=0.25),
    Way(scored="continuation"),
    Way(scored="continuation", copying=0.25),
    Way(scored="continuation", copying=1.0),
    Way(windows=64),
    Way(windows=64, scored="continuation", copying=0.25),
    Way(windows=64, scored="continuation", copying=1.0),
    Way(windows=64, objective="cross_entropy"),
    Way(windows=64, objective="hidden"),
    Way("span", windows=64, scored="continuation", copying=0.25),
    Way("beam", windows=64, scored="continuation", copying=0.25),
    Way("beam", windows=8, scored="continuation", copying=0.25),
    Way("annealing", windows=64, scored="continuation", copying=0.25),
    Way("annealing", windows=8, scored="continuation", copying=0.25),
    Way("EvoPress"),
    *(Way(scored="continuation", copying=share, gives_up="kv_only") for share in (0.0, 0.25, 1.0)),
    *(Way(scored="continuation", copying=share, folded=True) for share in (0.25, 1.0)),
)
"""Those that take longest come last."""


def found(
    way: Way, model: PreTrainedModel, text: Tensor, to_fold: Tensor, counts: Sequence[int]
) -> dict[int, tuple[Units, float]]:
    """What goes at every count, with its calibration loss as it was compared.

    `text` and `to_fold`, to make folds from, are windows (windows, tokens).
    """
    stack = block_stack(model)
    again = said_again(text[: round(way.copying * len(text))], PROMPT_TOKENS)
    windows, _ = interleaved(text, again) if len(again) else (text, [])
    engine: LossEngine
    if way.gives_up == "block":
        engine = WholeEngine(
            stack,
            windows,
            way.objective,
            chunk_windows=CHUNK_WINDOWS,
            anchor_bytes=ANCHOR_BYTES,
            prompt_tokens=PROMPT_TOKENS if way.scored == "continuation" else 1,
            repaired=FoldedSets(stack, to_fold, held_bytes=ANCHOR_BYTES) if way.folded else None,
        )
    else:
        engine = PrefillEngine(
            stack,
            windows,
            way.objective,
            decode=NOTHING,
            prompt_tokens=PROMPT_TOKENS,
            first_token="decode",
            chunk_windows=CHUNK_WINDOWS,
        )
    memo = Memo(engine.window_losses, engine.windows, racing=True, anchor=engine.anchor)
    blocks = len(stack.blocks)
    if way.algorithm == "EvoPress":
        sets = [evopress(stack, windows, count)[0] for count in counts]
    elif way.algorithm in OTHERS:
        ascent = Ascent(
            memo,
            NOTHING,
            sorted(deleting(range(blocks))),
            max(counts),
            on_progress=lambda done, best: None,
            out_of_time=lambda: False,
        )
        sets = OTHERS[way.algorithm](ascent, counts)
    else:
        result = searched(
            memo,
            algorithm="annealing" if way.algorithm == "annealing" else "greedy",
            num_blocks=blocks,
            remove=max(counts),
            base=NOTHING,
            scores=block_scores(stack, windows[:8], chunk_windows=8).cosine,
            evaluations=100 * blocks,
            seed=0,
            on_progress=lambda done, best: None,
            kind=way.gives_up,
        )
        sets = [result.frontier[count].units for count in counts]
    losses = engine.losses(sets)
    return {count: (units, losses[units]) for count, units in zip(counts, sets, strict=True)}


def beam(ascent: Ascent, counts: Sequence[int]) -> list[Units]:
    """Count by count, the best `BEAM` sets with one unit more than any of those before."""
    kept: list[Units] = [ascent.base]
    best: dict[int, Units] = {}
    for count in ascent.counts:
        wider = {units for one in kept for units in ascent.extensions(one)}
        losses = ascent.memo(sorted(wider, key=sorted))
        kept = sorted(losses, key=lambda units: (losses[units], sorted(units)))[:BEAM]
        best[count] = kept[0]
    return [best[count] for count in counts]


def spans(ascent: Ascent, counts: Sequence[int]) -> list[Units]:
    """Of all runs of so many blocks, the best."""
    last = len(ascent.offered)
    sets = []
    for count in counts:
        losses = ascent.memo([deleting(range(first, first + count)) for first in range(last - count + 1)])
        sets.append(min(losses, key=lambda units: (losses[units], sorted(units))))
    return sets


OTHERS: Mapping[str, Callable[[Ascent, Sequence[int]], list[Units]]] = {"beam": beam, "span": spans}


@dataclass(frozen=True)
class Subject:
    """The dense model, text to search on, and what it answers."""

    model: PreTrainedModel
    calibration: Tensor
    """(tokens,)"""
    questions: list[Questions]
    answers: list[Answers]


@lru_cache
def subject(
    model: Path, text: Path, count: int, passages: int, prompt: int, batch: int, dtype: torch.dtype | None
) -> Subject:
    """Read once in each process."""
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(model)
    splits = split_stream(token_stream(documents, tokenizer), tokens=WINDOW_TOKENS)
    held_out = splits["validation"]
    questions = [
        running_text(held_out, 2 * PROMPT_TOKENS, count=count, longest=2 * PROMPT_TOKENS),
        copied_spans(held_out, 2 * PROMPT_TOKENS, count=count),
        needles(held_out, tokenizer, prompt, count=count, seed=0),
        *([next_passage(held_out, PROMPT_TOKENS, count=passages, seed=0)] if passages else []),
    ]
    dense = load_model(model, dtype=dtype)
    layers = list(range(len(block_stack(dense).blocks)))
    answers = [answered(dense, dense, layers, asked, first_token="decode", batch=batch) for asked in questions]
    return Subject(dense, splits["calibration"], questions, answers)


def drawn(stream: Tensor, draw: int, count: int) -> Tensor:
    """So many windows (windows, tokens), evenly from the stream, in common with no other draw."""
    windows = stream[: len(stream) // WINDOW_TOKENS * WINDOW_TOKENS].view(-1, WINDOW_TOKENS)[draw :: len(DRAWS)]
    if len(windows) < count:
        raise ValueError(f"the text has {len(windows)} windows for each draw, {count} are asked for")
    return evenly(windows, count).to(device())


def evenly(windows: Tensor, count: int) -> Tensor:
    """So many of the windows (windows, tokens), at equal distances."""
    return windows[torch.arange(count) * len(windows) // count]


@dataclass(frozen=True)
class Search:
    """A way to search, on one draw of the text."""

    way: Way
    draw: int

    def __str__(self) -> str:
        return f"{self.way}, draw {self.draw}"


def measured(search: Search, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The sets of one search, and what is left of the model without them, as JSON."""
    way, draw = search.way, search.draw
    dtype = DTYPES.get(args.precision)
    given = subject(args.model, args.text, args.questions, args.passages, args.needle_tokens, args.batch, dtype)
    text = drawn(given.calibration, draw, way.windows)
    to_fold = drawn(given.calibration, draw, FOLD_TOKENS // WINDOW_TOKENS)
    few = evenly(to_fold, windows_to_fold(given.model.config.hidden_size, WINDOW_TOKENS))
    start, processor = time.perf_counter(), time.process_time()
    sets = found(way, given.model, text, few, args.counts)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    rows = []
    for count, (units, loss) in sets.items():
        removed = BlockPlan(len(block_stack(given.model).blocks), blocks_of(units), parts=parts_of(units))
        found_as = {
            "removed": sorted(unit.block for unit in units),
            "calibration_loss": loss,
            "seconds": round(seconds, 2),
            "processor_seconds": round(processor, 2),
        }
        prefill = pruned(given.model, removed)
        answers = {"as it is": asked(given, way, prefill, args.batch)}
        if way.gives_up == "block":
            answers["folded"] = asked(given, way, folded_half(given.model, removed, to_fold, args.batch), args.batch)
        for measured_as, what in answers.items():
            rows.append({"way": str(way), "draw": draw, "count": count, "as": measured_as, **found_as, "answers": what})
    return rows


def asked(given: Subject, way: Way, prefill: PreTrainedModel, batch: int) -> dict[str, dict[str, float]]:
    """What a pair with this prefill half answers, losses above the dense model's."""
    decode = prefill if way.gives_up == "block" else given.model
    layers = list(range(len(block_stack(decode).blocks)))
    answers = {}
    for questions, dense in zip(given.questions, given.answers, strict=True):
        own = answered(prefill, decode, layers, questions, first_token="decode", batch=batch)
        more, error = own.above(dense)
        answers[questions.name] = {"loss": more, "error": error, "exact": fmean(own.exact)}
    return answers


def tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown, a table for every count: the mean over draws, with the spread between them."""
    names = list(rows[0]["answers"])
    for count in sorted({row["count"] for row in rows}):
        yield (
            f"\n{count} blocks\n\n| search | objective | windows | scored | copying | seconds | sets | measured"
            f" | {' | '.join(names)} |"
        )
        yield "|---" * (8 + len(names)) + "|"
        for way, measured_as in dict.fromkeys((row["way"], row["as"]) for row in rows):
            of_way = [row for row in rows if (row["way"], row["as"], row["count"]) == (way, measured_as, count)]
            sets = len({tuple(row["removed"]) for row in of_way})
            cells = []
            for name in names:
                kind = "exact" if name.startswith(("needle", "next")) else "loss"
                values = [row["answers"][name][kind] for row in of_way]
                spread = stdev(values) if len(values) > 1 else 0.0
                cells.append(
                    f"{fmean(values):.0%} ± {spread:.0%}" if kind == "exact" else f"{fmean(values):+.3f} ± {spread:.3f}"
                )
            seconds = fmean(row["seconds"] for row in of_way)
            yield f"| {way} | {seconds:.1f} | {sets} | {measured_as} | {' | '.join(cells)} |"


def main() -> None:
    """Run the searches, and print the tables."""
    parser = arguments(__doc__)
    parser.add_argument("--text", type=Path, required=True, help="a JSON object with `text` a line")
    parser.add_argument("--counts", type=int, nargs="+", default=[3, 6, 9])
    parser.add_argument("--ways", type=int, nargs="*", help="numbers of the ways to search, from 0; by default all")
    parser.add_argument("--draws", type=int, nargs="*", default=list(DRAWS))
    parser.add_argument("--passages", type=int, default=160, help="to tell which goes on; each reads four; 0: none")
    parser.add_argument("--needle-tokens", type=int, default=512)
    args = parser.parse_args()
    file = args.out / "rows.jsonl"
    if not args.table:
        run(args, file)
    if rows := written(file):
        print("\n".join(tables(rows)))


def run(args: argparse.Namespace, file: Path) -> None:
    """Run every search that the file does not have, and append its rows."""
    until = time.monotonic() + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    file.touch()
    done_before = {(row["way"], row["draw"]) for row in written(file)}
    ways = WAYS if args.ways is None else [WAYS[number] for number in args.ways]
    searches = [Search(way, draw) for way in ways for draw in args.draws if (str(way), draw) not in done_before]
    append(file, measured, searches, args, until)


if __name__ == "__main__":
    main()
