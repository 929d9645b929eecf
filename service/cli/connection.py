"""How commands reach the service, and what a refusal looks like in a shell."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from pydantic import BaseModel
from rich.console import Console

from service.client import Client, CorruptDownload, ServiceError, ServiceUnreachable

console = Console()
errors = Console(stderr=True)

Url = Annotated[str, typer.Option("--url", envvar="PDTRIM_URL", help="Where the service is.")]
Key = Annotated[str | None, typer.Option("--api-key", envvar="PDTRIM_API_KEY", help="Key the service asks for.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
JobId = Annotated[str, typer.Argument(help="The job's id, as `submit` and `jobs` print it.", metavar="JOB")]
DEFAULT_URL = "http://127.0.0.1:8000"


@contextmanager
def connected(url: str, api_key: str | None) -> Iterator[Client]:
    """A client; what goes wrong is printed and ends the command with exit code 1."""
    try:
        with Client(url, api_key=api_key) as client:
            yield client
    except (ServiceError, ServiceUnreachable, CorruptDownload) as error:
        fail(str(error))


def fail(message: str) -> None:
    """Print an error and end the command. Raises: typer.Exit."""
    errors.print(f"[bold red]Error:[/] {message}", highlight=False)
    raise typer.Exit(1)


def print_json(shown: BaseModel) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(shown.model_dump_json(indent=2) + "\n")
