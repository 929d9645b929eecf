"""How commands reach the service, and what a refusal looks like in a shell."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape

from pdtrim.client import Client, ClientError

console = Console()
errors = Console(stderr=True)

Url = Annotated[str, typer.Option("--url", envvar="PDTRIM_URL", help="Where the service is.")]
Key = Annotated[str | None, typer.Option("--api-key", envvar="PDTRIM_API_KEY", help="Key the service asks for.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
USAGE = 2
"""Exit code of a command that was called wrongly."""
COMPLETION_SECONDS = 2.0
COMPLETED = 50


def complete_jobs(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """The latest jobs whose ids begin so, each with what it is: what a shell offers where a job is asked for.

    A service that does not answer offers nothing: a shell has no place for errors.
    """
    try:
        with Client(
            context.params.get("url"),
            api_key=context.params.get("api_key"),
            timeout_s=COMPLETION_SECONDS,
            patience_s=0.0,
        ) as client:
            found = client.page(limit=COMPLETED).data
    except (ClientError, ValueError):
        return []
    return [(job.id, f"{job.status}, {job.spec.model.source}") for job in found if job.id.startswith(incomplete)]


JobId = Annotated[
    str,
    typer.Argument(help="The job's id, as `submit` and `jobs` print it.", metavar="JOB", autocompletion=complete_jobs),
]


@contextmanager
def connected(url: str, api_key: str | None) -> Iterator[Client]:
    """A client; what goes wrong is printed and ends the command."""
    try:
        client = Client(url, api_key=api_key)
    except ValueError as error:
        fail(str(error), code=USAGE)
    try:
        with client:
            yield client
    except ClientError as error:
        fail(str(error))


def fail(message: str, *, code: int = 1) -> NoReturn:
    """Print an error and end the command. Raises: typer.Exit."""
    errors.print(f"[bold red]Error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def print_json(shown: BaseModel) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(shown.model_dump_json(indent=2) + "\n")
