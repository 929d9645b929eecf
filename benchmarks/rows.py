"""Rows that take minutes each: several processes make them, a file keeps them, a run that was cut off goes on."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from workers.stages.precision import DTYPES

Asked = TypeVar("Asked")
Row = Mapping[str, Any]
"""As JSON."""


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """What every program says that asks models questions in this way."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for rows.jsonl")
    parser.add_argument("--table", action="store_true", help="print the tables of an earlier run")
    parser.add_argument("--precision", choices=("auto", *DTYPES), default="auto", help="of all that runs")
    parser.add_argument("--questions", type=int, default=160, help="of each kind")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=1, help="at a time")
    parser.add_argument("--seconds", type=float, default=1e9, help="when to stop, with what is done by then")
    return parser


def written(file: Path) -> list[dict[str, Any]]:
    """The rows that a run has written."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def append(
    file: Path,
    make: Callable[[Asked, argparse.Namespace], Sequence[Row]],
    asked: Sequence[Asked],
    args: argparse.Namespace,
    until: float,
) -> None:
    """Make the rows of all that is asked, `args.jobs` at a time, and append them as they come, until a monotonic time.

    What fails is said, and the others go on.
    """
    pool = ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"))
    with file.open("a") as lines:
        running = {pool.submit(make, one, args): one for one in asked}
        try:
            for done in as_completed(running, timeout=max(until - time.monotonic(), 0)):
                if (error := done.exception()) is not None:
                    print(f"{running[done]}:", *traceback.format_exception(error), sep="\n", flush=True)
                    continue
                lines.write("".join(json.dumps(row) + "\n" for row in done.result()))
                lines.flush()
                print(f"done: {running[done]}", flush=True)
        except TimeoutError:
            print("the time is up", flush=True)
            for process in (pool._processes or {}).values():
                process.terminate()
        pool.shutdown(cancel_futures=True)
