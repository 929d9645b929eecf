"""The commands about jobs; each is a few calls of the Python client."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from pdtrim.client import Client, ClientJob
from pdtrim.client.transports import DEFAULT_URL
from pdtrim.command.connection import (
    USAGE,
    JobId,
    Json,
    Key,
    Url,
    connected,
    console,
    errors,
    fail,
    print_json,
)
from pdtrim.contract.jobs import Artifact, Job, JobStatus, StageName
from pdtrim.display.jobs import artifact_table, job_page, job_table, what_next
from pdtrim.display.progress import LiveProgress

Watch = Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")]


def submit(
    spec: Annotated[Path, typer.Argument(help="The job as YAML or JSON; `-` reads standard input.", metavar="SPEC")],
    watch: Watch = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Submit a job and print its id.

    A job names a model and how many blocks each serving stage gives up; `/docs` of the service lists what else it may
    set. Sources are `reference`, `hf://organisation/name`, `file:///folder` and `s3://bucket/prefix`.

    Example: `echo '{model: reference, prefill: {remove_blocks: 2}, decode: {remove_blocks: 4}}' | pdtrim submit -`
    """
    body = read_spec(spec)
    with connected(url, api_key) as client:
        submitted(client, client.create(body), watch=watch, as_json=as_json)


def submitted(client: Client, job: Job, *, watch: bool, as_json: bool) -> None:
    """Print a new job's id, or follow it to its end first. Raises: typer.Exit where it does not succeed."""
    if watch:
        # JSON is alone on standard output.
        job = follow(client, job.id, errors if as_json else console)
    if as_json:
        print_json(job)
    elif watch:
        console.print(job_page(job))
        console.print(what_next(job))
    else:
        console.print(job.id, highlight=False)
    if watch:
        _exit_with(job)


def read_spec(path: Path) -> dict[str, Any]:
    """A job's specification as it is written. What cannot be read ends the command."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text()
        body = yaml.safe_load(text)
        json.dumps(body)
    except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError, yaml.YAMLError) as error:
        fail(f"{path} cannot be read: {error}", code=USAGE)
    if not isinstance(body, dict):
        fail(f"{path} holds no job: it must be a mapping with model, prefill and decode", code=USAGE)
    return body


def jobs(
    status: Annotated[JobStatus | None, typer.Option(help="Only jobs in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many, newest first.")] = 20,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """List jobs, newest first.

    Example: `pdtrim jobs --status running`
    """
    with connected(url, api_key) as client:
        page = client.page(limit=limit, status=status)
    if as_json:
        print_json(page)
    elif page.data:
        console.print(job_table(page.data, datetime.now(UTC)))
    elif status is None:
        console.print("There are no jobs yet. `pdtrim submit` makes one, its --help has an example.", soft_wrap=True)
    else:
        console.print(f"No job is {status}.")


def show(job: JobId, url: Url = DEFAULT_URL, api_key: Key = None, as_json: Json = False) -> None:
    """Show a job: its stages, what they found, its error or its report.

    Example: `pdtrim show job_0198a3f25e0e7c52b3a0d1f3b6a4c7de`
    """
    with connected(url, api_key) as client:
        found = client.get(job)
    if as_json:
        print_json(found)
    else:
        console.print(job_page(found))


def watch(job: JobId, url: Url = DEFAULT_URL, api_key: Key = None, as_json: Json = False) -> None:
    """Follow a job live until it ends. Exit code 0 when it succeeds, 1 when it fails or is cancelled.

    Example: `pdtrim watch job_0198a3f25e0e7c52b3a0d1f3b6a4c7de`
    """
    with connected(url, api_key) as client:
        if as_json:
            for event in client.events(job):
                sys.stdout.write(event.model_dump_json() + "\n")
                sys.stdout.flush()
            ended = client.get(job)
        else:
            ended = follow(client, job)
            console.print(job_page(ended))
            console.print(what_next(ended))
    _exit_with(ended)


def follow(client: Client, job_id: str, to: Console = console) -> ClientJob:
    """Show progress until the job ends, and return it as it ended."""
    with LiveProgress(to) as progress:
        for event in client.events(job_id):
            progress.show(event)
    return client.get(job_id)


def _exit_with(job: Job) -> None:
    if job.status != JobStatus.SUCCEEDED:
        raise typer.Exit(1)


def cancel(job: JobId, url: Url = DEFAULT_URL, api_key: Key = None, as_json: Json = False) -> None:
    """Cancel a job. What its finished stages left stays, and `pdtrim resume` goes on from there.

    Example: `pdtrim cancel job_0198a3f25e0e7c52b3a0d1f3b6a4c7de`
    """
    with connected(url, api_key) as client:
        _print_status(client.cancel(job), as_json)


def pause(job: JobId, url: Url = DEFAULT_URL, api_key: Key = None, as_json: Json = False) -> None:
    """Pause a job: within seconds its worker stops and is free for other jobs.

    Example: `pdtrim pause job_0198a3f25e0e7c52b3a0d1f3b6a4c7de`
    """
    with connected(url, api_key) as client:
        _print_status(client.pause(job), as_json)


def resume(job: JobId, url: Url = DEFAULT_URL, api_key: Key = None, as_json: Json = False) -> None:
    """Have a paused, failed or cancelled job go on from its last saved state. Finished stages are not repeated.

    Example: `pdtrim resume job_0198a3f25e0e7c52b3a0d1f3b6a4c7de`
    """
    with connected(url, api_key) as client:
        _print_status(client.resume(job), as_json)


def _print_status(job: Job, as_json: bool) -> None:
    if as_json:
        print_json(job)
    else:
        console.print(f"{job.id} is {job.status}", highlight=False)


def delete(
    job: JobId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Delete a finished or paused job with its events and artifacts, for good.

    Example: `pdtrim delete job_0198a3f25e0e7c52b3a0d1f3b6a4c7de --yes`
    """
    if not yes:
        typer.confirm(f"Delete {job} and everything it left?", abort=True, err=True)
    with connected(url, api_key) as client:
        client.delete(job)
    if as_json:
        sys.stdout.write(json.dumps({"id": job, "deleted": True}, indent=2) + "\n")
    else:
        console.print(f"{job} is deleted", highlight=False, markup=False)


Stage = Annotated[StageName | None, typer.Option("--stage", help="Only what this stage left.")]


def artifacts(
    job: JobId, stage: Stage = None, url: Url = DEFAULT_URL, api_key: Key = None, as_json: Json = False
) -> None:
    """List what a job left in the artifact store. With --json, one artifact a line.

    Example: `pdtrim artifacts job_0198a3f25e0e7c52b3a0d1f3b6a4c7de --stage export`
    """
    with connected(url, api_key) as client:
        found = list(client.artifacts(job, stage=stage))
    if as_json:
        for artifact in found:
            sys.stdout.write(artifact.model_dump_json() + "\n")
        return
    console.print(artifact_table(found))


def download(
    job: JobId,
    to: Annotated[Path, typer.Option("--to", help="Folder to put the files in.")] = Path(),
    only: Annotated[str, typer.Option("--only", help="Only files whose name begins so, such as `decode/`.")] = "",
    stage: Annotated[
        StageName | None, typer.Option("--stage", help="The stage whose files to get; by default, the checkpoints.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Download a job's checkpoints, or what another of its stages left.

    Every file's SHA-256 is checked. Files that are there already are left alone, and an interrupted download goes on.

    Example: `pdtrim download job_0198a3f25e0e7c52b3a0d1f3b6a4c7de --only decode/ --to ./model`
    """
    with connected(url, api_key) as client:
        paths = fetch(client, job, to, stage, only)
    if as_json:
        sys.stdout.write(json.dumps([str(path) for path in paths], indent=2) + "\n")
    else:
        count = "1 file" if len(paths) == 1 else f"{len(paths)} files"
        console.print(f"{count} in {to.resolve()}", highlight=False, soft_wrap=True, markup=False)


def fetch(client: Client, job_id: str, folder: Path, stage: StageName | None, only: str) -> list[Path]:
    """Download the files of a stage, or the checkpoints, whose names begin with `only`, with a progress bar."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        bar = progress.add_task("", total=None)

        def show(artifact: Artifact, held: int) -> None:
            progress.update(bar, description=artifact.name, total=artifact.size, completed=held)

        return client.download_all(job_id, folder, stage=stage, only=only, on_bytes=show)
