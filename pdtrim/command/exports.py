"""The commands about what a job could be, or could have been: estimates, frontiers, other exports, comparisons."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pdtrim.client.transports import DEFAULT_URL
from pdtrim.command.connection import (
    USAGE,
    JobId,
    Json,
    Key,
    Url,
    complete_jobs,
    connected,
    console,
    fail,
    print_json,
)
from pdtrim.command.jobs import Watch, read_spec, submitted
from pdtrim.display.comparison import comparison, figures
from pdtrim.display.rendering import estimate_report, frontier_report, rendered


def estimate(
    spec: Annotated[Path, typer.Argument(help="The job as YAML or JSON; `-` reads standard input.", metavar="SPEC")],
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Check a job without submitting it, and show what it would make and take.

    Refuses what `pdtrim submit` refuses. Sizes, memory and the sets to evaluate follow from the model's configuration;
    times are those of an earlier job on the same model, where there is one. Warnings come last.

    Example: `pdtrim estimate job.yaml`
    """
    body = read_spec(spec)
    with connected(url, api_key) as client:
        found = client.estimate(body)
    if as_json:
        print_json(found)
    else:
        console.print(estimate_report(found))


def frontier(job: JobId, url: Url = DEFAULT_URL, api_key: Key = None, as_json: Json = False) -> None:
    """Show what giving up ever more blocks costs: the best set and its loss for every count, in each half.

    An arrow marks what the job chose. `pdtrim export` makes the checkpoints of another line, without another search.

    Example: `pdtrim frontier job_0198a3f25e0e7c52b3a0d1f3b6a4c7de`
    """
    with connected(url, api_key) as client:
        found = client.frontier(job)
    if as_json:
        print_json(found)
    else:
        console.print(frontier_report(found))


def export(
    job: JobId,
    prefill: Annotated[int | None, typer.Option(min=0, help="Blocks that prefill gives up.")] = None,
    decode: Annotated[int | None, typer.Option(min=0, help="Blocks that decode gives up.")] = None,
    unified: Annotated[int | None, typer.Option(min=0, help="Instead: blocks that one checkpoint gives up.")] = None,
    watch: Watch = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Cut another export from a job's frontier, and print the id of the job that makes it.

    It takes over the scores and the search, and distils, exports and evaluates as that job does. `pdtrim frontier`
    lists the counts. With prefill's count as in that job, every count of decode will do.

    Example: `pdtrim export job_0198a3f25e0e7c52b3a0d1f3b6a4c7de --prefill 2 --decode 3 --watch`
    """
    counts = (prefill, decode) if unified is None else (unified, unified)
    if counts[0] is None or counts[1] is None or (unified is not None and (prefill, decode) != (None, None)):
        fail("give --prefill and --decode, or --unified alone", code=USAGE)
    with connected(url, api_key) as client:
        made = client.export(job, prefill=counts[0], decode=counts[1])
        submitted(client, made, watch=watch, as_json=as_json)


def compare(
    job: JobId,
    other: Annotated[
        str, typer.Argument(help="The job to hold against it.", metavar="OTHER", autocompletion=complete_jobs)
    ],
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Put the figures of two jobs side by side, and say by how much the second's differ.

    What a job has not come to yet is left empty. With --json, each job's figures by name.

    Example: `pdtrim compare job_0198a3f25e0e7c52b3a0d1f3b6a4c7de job_0198a41b7c3f7d90a1b2c3d4e5f60718`
    """
    with connected(url, api_key) as client:
        first, second = client.get(job), client.get(other)
    if as_json:
        sys.stdout.write(json.dumps({one.id: figures(one) for one in (first, second)}, indent=2) + "\n")
    else:
        console.print(rendered(comparison(first, second)))
