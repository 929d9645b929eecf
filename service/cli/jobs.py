"""The commands about jobs; each is a few calls of the Python client."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from service.cli.connection import DEFAULT_URL, JobId, Json, Key, Url, connected, console, fail, print_json
from service.cli.display import LiveProgress, job_page, job_table
from service.client import Client
from service.contract.jobs import Job, JobStatus, StageName


def submit(
    spec: Annotated[Path, typer.Argument(help="The job as YAML or JSON; `-` reads standard input.", metavar="SPEC")],
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Submit a job and print its id.

    Example: `echo '{model: reference, prefill: {remove_blocks: 2}, decode: {remove_blocks: 4}}' | pdtrim submit -`
    """
    body = _read_spec(spec)
    with connected(url, api_key) as client:
        job = client.create(body)
        if watch:
            job = follow(client, job.id)
        if as_json:
            print_json(job)
        elif watch:
            console.print(job_page(job))
        else:
            console.print(job.id, highlight=False)
    if watch:
        _exit_with(job)


def _read_spec(path: Path) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text()
        body = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        fail(f"{path} cannot be read: {error}")
    if not isinstance(body, dict):
        fail(f"{path} holds no job: it must be a mapping with model, prefill and decode")
    return dict(body)


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
        page = client.jobs(limit=limit, status=status)
    if as_json:
        print_json(page)
    else:
        console.print(job_table(page.data))


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
    _exit_with(ended)


def follow(client: Client, job_id: str) -> Job:
    """Show progress until the job ends, and return it as it ended."""
    with LiveProgress(console) as progress:
        for event in client.events(job_id):
            progress.show(event)
    return client.get(job_id)


def _exit_with(job: Job) -> None:
    if job.status != JobStatus.SUCCEEDED:
        raise typer.Exit(1)


def cancel(job: JobId, url: Url = DEFAULT_URL, api_key: Key = None, as_json: Json = False) -> None:
    """Cancel a job. What its finished stages left stays.

    Example: `pdtrim cancel job_0198a3f25e0e7c52b3a0d1f3b6a4c7de`
    """
    with connected(url, api_key) as client:
        found = client.cancel(job)
    if as_json:
        print_json(found)
    else:
        console.print(f"{found.id} is {found.status}", highlight=False)


Stage = Annotated[StageName | None, typer.Option("--stage", help="Only what this stage left.")]


def artifacts(
    job: JobId, stage: Stage = None, url: Url = DEFAULT_URL, api_key: Key = None, as_json: Json = False
) -> None:
    """List what a job left in the artifact store.

    Example: `pdtrim artifacts job_0198a3f25e0e7c52b3a0d1f3b6a4c7de --stage export`
    """
    with connected(url, api_key) as client:
        found = list(client.artifacts(job, stage=stage))
    if as_json:
        for artifact in found:
            sys.stdout.write(artifact.model_dump_json() + "\n")
        return
    table = Table("stage", "name", "size", "SHA-256", "where", box=None, header_style="bold")
    for artifact in found:
        table.add_row(artifact.stage, artifact.name, decimal(artifact.size), artifact.sha256[:12], artifact.uri)
    console.print(table)


def download(
    job: JobId,
    to: Annotated[Path, typer.Option("--to", help="Folder to put the files in.")] = Path(),
    only: Annotated[str, typer.Option("--only", help="Only files whose name begins so, such as `decode/`.")] = "",
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Download a job's checkpoints. Interrupted downloads go on, and every file's SHA-256 is checked.

    Example: `pdtrim download job_0198a3f25e0e7c52b3a0d1f3b6a4c7de --only decode/ --to ./model`
    """
    with connected(url, api_key) as client:
        count = fetch(client, job, to, only)
    if count == 0:
        fail(f"{job} has no exported file whose name begins with {only!r}; list them with `pdtrim artifacts {job}`")
    console.print(f"{count} files in {to.resolve()}", highlight=False)


def fetch(client: Client, job_id: str, folder: Path, only: str) -> int:
    """Download a job's exported files below `folder` with a progress bar, and say how many there were."""
    wanted = [file for file in client.artifacts(job_id, stage=StageName.EXPORT) if file.name.startswith(only)]
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("downloading", total=sum(artifact.size for artifact in wanted))
        for artifact in wanted:
            client.download(
                job_id, artifact, folder / artifact.name, on_bytes=lambda count: progress.advance(bar, count)
            )
    return len(wanted)
