"""Which search finds blocks whose loss holds on other text: what it minimises, on how much of which text, and how.

    make build/real/.ready
    python -m benchmarks.held_out --model build/real/smollm2-135m-instruct --text build/real/brown.jsonl --out FOLDER

Whole blocks that both halves give up, or blocks of prefill but their keys and values, nothing healed. Every way to
search is tried on three draws of calibration text that have no window in common. Its sets are measured as pairs are
served, on text that no search saw: continuations of 128 tokens, spans copied from the prompt, numbers that stand in it,
and choices between continuations. Rows go to rows.jsonl as they end; a run that was cut off goes on, and with --table
the tables are made of what there is.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks.choices import evopress
from benchmarks.questions import Answers, Questions, answered, copied_spans, needles, next_passage, running_text
from workers.inputs.models import device, load_model
from workers.pruning.model.blocks import block_stack
from workers.pruning.model.calibration import interleaved, said_again, split_stream, token_stream
from workers.pruning.model.parts import pruned
from workers.pruning.model.plan import BlockPlan
from workers.pruning.model.units import NOTHING, Kind, Units, deleting, parts_of
from workers.pruning.search.ascent import Ascent
from workers.pruning.search.engine import LossEngine, Objective, WholeEngine
from workers.pruning.search.memo import Memo
from workers.pruning.search.prefill_engine import PrefillEngine
from workers.pruning.search.scores import block_scores
from workers.pruning.search.search import search
from workers.stages.precision import DTYPES

WINDOW_TOKENS, PROMPT_TOKENS = 256, 128
DRAWS = range(3)
BEAM = 4
CHUNK_WINDOWS = 16
ANCHOR_BYTES = 2**30


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

    def __str__(self) -> str:
        return f"{self.algorithm} | {self.objective} | {self.windows} | {self.scored} | {self.copying:.0%}" + (
            "" if self.gives_up == "block" else f", {self.gives_up} in prefill"
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
)
"""Those that take longest come last."""


def found(way: Way, model: PreTrainedModel, text: Tensor, counts: Sequence[int]) -> dict[int, tuple[Units, float]]:
    """What goes at every count, with its calibration loss; `text` is windows (windows, tokens)."""
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
        result = search(
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
def subject(model: Path, text: Path, count: int, prompt: int, batch: int, dtype: torch.dtype | None) -> Subject:
    """Read once in each process."""
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(model)
    splits = split_stream(token_stream(documents, tokenizer), tokens=WINDOW_TOKENS)
    held_out = splits["validation"]
    questions = [
        running_text(held_out, 2 * PROMPT_TOKENS, count=count, longest=2 * PROMPT_TOKENS),
        copied_spans(held_out, 2 * PROMPT_TOKENS, count=count),
        needles(held_out, tokenizer, prompt, count=count, seed=0),
        next_passage(held_out, PROMPT_TOKENS, count=count, seed=0),
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
    return windows[torch.arange(count) * len(windows) // count].to(device())


def measured(way: Way, draw: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The sets of one search, and what is left of the model without them, as JSON."""
    given = subject(args.model, args.text, args.questions, args.needle_tokens, args.batch, DTYPES.get(args.precision))
    start, processor = time.perf_counter(), time.process_time()
    sets = found(way, given.model, drawn(given.calibration, draw, way.windows), args.counts)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    rows = []
    blocks = len(block_stack(given.model).blocks)
    for count, (units, loss) in sets.items():
        plan = BlockPlan(blocks, frozenset(unit.block for unit in units if unit.kind == "block"), parts=parts_of(units))
        prefill = pruned(given.model, plan)
        decode = prefill if way.gives_up == "block" else given.model
        layers = list(range(len(block_stack(decode).blocks)))
        answers = {}
        for asked, dense in zip(given.questions, given.answers, strict=True):
            own = answered(prefill, decode, layers, asked, first_token="decode", batch=args.batch)
            more, error = own.above(dense)
            answers[asked.name] = {"loss": more, "error": error, "exact": fmean(own.exact)}
        rows.append(
            {
                "way": str(way),
                "draw": draw,
                "count": count,
                "removed": sorted(unit.block for unit in units),
                "calibration_loss": loss,
                "seconds": round(seconds, 2),
                "processor_seconds": round(processor, 2),
                "answers": answers,
            }
        )
    return rows


def tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown, a table for every count: the mean over draws, with the spread between them."""
    names = list(rows[0]["answers"])
    for count in sorted({row["count"] for row in rows}):
        yield f"\n{count} blocks\n\n| search | objective | windows | scored | copying | seconds | {' | '.join(names)} |"
        yield "|---" * (6 + len(names)) + "|"
        for way in dict.fromkeys(row["way"] for row in rows):
            of_way = [row for row in rows if (row["way"], row["count"]) == (way, count)]
            cells = []
            for name in names:
                kind = "exact" if name.startswith(("needle", "next")) else "loss"
                values = [row["answers"][name][kind] for row in of_way]
                spread = stdev(values) if len(values) > 1 else 0.0
                cells.append(
                    f"{fmean(values):.0%} ± {spread:.0%}" if kind == "exact" else f"{fmean(values):+.3f} ± {spread:.3f}"
                )
            yield f"| {way} | {fmean(row['seconds'] for row in of_way):.1f} | {' | '.join(cells)} |"


def main() -> None:
    """Run the searches, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="a JSON object with `text` a line")
    parser.add_argument("--out", type=Path, required=True, help="folder for rows.jsonl")
    parser.add_argument("--table", action="store_true", help="print the tables of an earlier run")
    parser.add_argument("--counts", type=int, nargs="+", default=[3, 6, 9])
    parser.add_argument("--ways", type=int, nargs="*", help="numbers of the ways to search, from 0; by default all")
    parser.add_argument("--draws", type=int, nargs="*", default=list(DRAWS))
    parser.add_argument("--questions", type=int, default=160, help="of each kind")
    parser.add_argument("--needle-tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="at a time")
    parser.add_argument("--seconds", type=float, default=1e9, help="when to stop, with what is done by then")
    args = parser.parse_args()
    file = args.out / "rows.jsonl"
    if not args.table:
        run(args, file)
    if rows := [json.loads(line) for line in file.read_text().splitlines()]:
        print("\n".join(tables(rows)))


def run(args: argparse.Namespace, file: Path) -> None:
    """Run every search that the file does not have, so many at a time, and append its rows."""
    until = time.monotonic() + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    file.touch()
    done_before = {(row["way"], row["draw"]) for row in map(json.loads, file.read_text().splitlines())}
    ways = WAYS if args.ways is None else [WAYS[number] for number in args.ways]
    asked = [(way, draw) for way in ways for draw in args.draws if (str(way), draw) not in done_before]
    pool = ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"))
    running = {pool.submit(measured, way, draw, args): (way, draw) for way, draw in asked}
    with file.open("a") as lines:
        try:
            for done in as_completed(running, timeout=max(until - time.monotonic(), 0)):
                way, draw = running[done]
                if (error := done.exception()) is not None:
                    print(f"{way}, draw {draw}:", *traceback.format_exception(error), sep="\n", flush=True)
                    continue
                lines.write("".join(json.dumps(row) + "\n" for row in done.result()))
                lines.flush()
                print(f"{way}, draw {draw}: {done.result()[0]['seconds']} s", flush=True)
        except TimeoutError:
            print("the time is up", flush=True)
            for process in (pool._processes or {}).values():
                process.terminate()
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
