"""`pdtrim keys`: make, list and revoke API keys, directly on the database."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from sqlmodel import Session

from pdtrim.command.connection import USAGE, Json, console, fail, print_json
from pdtrim.contract.access import DEFAULT_PROJECT, PROJECT_PATTERN, RATE_PATTERN, KeyInfo, NewKey, Quotas, Scope
from pdtrim.display.jobs import when
from service.commands.run import configured
from service.db import keys
from service.db.session import connect, schema_is_current, transaction
from service.db.tables import now

MOST = 2**31 - 1
MOST_BYTES = 2**63 - 1
"""What the database's columns hold."""

app = typer.Typer(
    name="keys",
    help="Make, list and revoke API keys, on the database in PDTRIM_DATABASE_URL.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, for those who list keys.", metavar="NAME")],
    scope: Annotated[
        list[Scope] | None,
        typer.Option("--scope", help="What it allows; may be repeated. `admin` is all.", show_default="read, submit"),
    ] = None,
    project: Annotated[str, typer.Option(help="The project whose jobs it sees.")] = DEFAULT_PROJECT,
    expires_days: Annotated[int | None, typer.Option(min=1, max=3650, help="Days that it opens.")] = None,
    rate_limit: Annotated[
        str | None,
        typer.Option(
            help="Requests it may make, as `100/minute` (second, minute, hour, day), or `none` for any number.",
            show_default="PDTRIM_RATE_LIMIT",
        ),
    ] = None,
    max_running_jobs: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Jobs made with it that run at once; the others wait.")
    ] = None,
    max_queued_jobs: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Jobs made with it that may be queued; more are refused.")
    ] = None,
    max_artifact_bytes: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_BYTES, help="Once jobs made with it keep so many bytes, it makes no more."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it: this once, as only its hash is kept.

    Its quotas come on top of those of its project (PDTRIM_MAX_RUNNING_JOBS, …): both hold.

    Example: `pdtrim keys create ci --project serving --scope submit --expires-days 90 --max-running-jobs 2`
    """
    if not re.fullmatch(PROJECT_PATTERN, project):
        fail(f"{project!r} is no project: up to 64 of a-z, 0-9, `.`, `_`, `-`, the first a letter or digit", code=USAGE)
    if not 1 <= len(name) <= 128 or not name.isprintable():
        fail("a key's name has 1 to 128 printable characters", code=USAGE)
    if rate_limit is not None and not re.fullmatch(RATE_PATTERN, rate_limit):
        fail(f"{rate_limit!r} is no rate: it looks like 100/minute, with second, minute, hour or day", code=USAGE)
    quotas = Quotas(
        max_running_jobs=max_running_jobs, max_queued_jobs=max_queued_jobs, max_artifact_bytes=max_artifact_bytes
    )
    with _database() as session:
        row, key = keys.create(
            session,
            project=project,
            name=name,
            scopes=scope or (Scope.READ, Scope.SUBMIT),
            expires_at=None if expires_days is None else now() + timedelta(days=expires_days),
            rate_limit=rate_limit,
            quotas=quotas,
        )
        made = NewKey(key=key, **KeyInfo.model_validate(row).model_dump())
    if as_json:
        print_json(made)
    else:
        console.print(made.key, markup=False, highlight=False, soft_wrap=True)


def list_(
    project: Annotated[str | None, typer.Option(help="Only this project's keys.")] = None, as_json: Json = False
) -> None:
    """List the keys, without their secrets. With --json, one key a line.

    Example: `pdtrim keys list --project serving`
    """
    with _database() as session:
        found = [KeyInfo.model_validate(row) for row in keys.every(session, project)]
    if as_json:
        for key in found:
            sys.stdout.write(key.model_dump_json() + "\n")
        return
    table = Table(box=None, header_style="bold")
    for column in ("prefix", "name", "project", "scopes", "limits", "created", "expires", "revoked"):
        table.add_column(column, overflow="fold")
    for key in found:
        times = ["" if at is None else when(at) for at in (key.created_at, key.expires_at, key.revoked_at)]
        table.add_row(key.prefix, Text(key.name), key.project, ", ".join(key.scopes), _limits(key), *times)
    console.print(table)


def _limits(key: KeyInfo) -> str:
    """What a key's own limits are, in a few words."""
    kept = None if key.max_artifact_bytes is None else decimal(key.max_artifact_bytes)
    found = ((key.rate_limit, "requests"), (key.max_running_jobs, "running"), (key.max_queued_jobs, "queued"))
    return ", ".join(f"{most} {what}" for most, what in (*found, (kept, "kept")) if most is not None)


def revoke(
    prefix: Annotated[str, typer.Argument(help="The 12 digits after `pdt_`, as `list` prints them.", metavar="PREFIX")],
    as_json: Json = False,
) -> None:
    """Close a key for ever, from the next request on.

    Example: `pdtrim keys revoke 1f3b6a4c7de0`
    """
    try:
        with _database() as session:
            revoked = KeyInfo.model_validate(keys.revoke(session, prefix))
    except keys.NoSuchKey as error:
        fail(str(error))
    if as_json:
        print_json(revoked)
    else:
        console.print(f"The key {revoked.prefix} opens nothing any more.", highlight=False)


COMMANDS: dict[str, Callable[..., None]] = {"create": create, "list": list_, "revoke": revoke}
for command_name, command in COMMANDS.items():
    app.command(command_name)(command)


@contextmanager
def _database() -> Iterator[Session]:
    database = connect(configured().database_url)
    try:
        if not schema_is_current(database):
            fail("the database's schema is not the newest; run `pdtrim migrate` first")
        with transaction(database) as session:
            yield session
    finally:
        database.dispose()
