"""Commands that run the service. They come with an extra, by an entry point, and say so where it is not installed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import NamedTuple

import typer
from typer.core import TyperCommand

from pdtrim.command.connection import fail

GROUP = "pdtrim.commands"
"""The entry points that name Typer applications whose commands become commands of `pdtrim`."""
PANEL = "Service"


class Operating(NamedTuple):
    """A command that an extra brings: which one, and what the list of commands says of it."""

    extra: str
    help: str


OPERATING = {
    "demo": Operating("worker", "Prune the reference model once, end to end over HTTP."),
    "up": Operating("worker", "Run the whole service here: gateway, worker, SQLite and a folder of artifacts."),
    "gateway": Operating("service", "Run the gateway alone; workers run elsewhere."),
    "worker": Operating("worker", "Run one worker, on the GPU if there is one."),
    "ping": Operating("service", "Ask the workers of this machine for a sign of life."),
    "reconcile": Operating("service", "Run the reconciler alone."),
    "migrate": Operating("service", "Bring the database to the newest schema."),
    "doctor": Operating("service", "Check this installation."),
    "keys": Operating("service", "Make, list and revoke API keys."),
}


@cache
def operating_commands() -> Mapping[str, TyperCommand | typer.core.TyperGroup]:
    """The commands that run the service, by name: real ones, or ones that say what is missing."""
    found: dict[str, TyperCommand | typer.core.TyperGroup] = {}
    for entry in entry_points(group=GROUP):
        try:
            found |= typer.main.get_group(entry.load()).commands  # type: ignore[arg-type]
        except ModuleNotFoundError as error:
            missing = error.name or str(error)
            found |= {name: _explained(name, command, missing) for name, command in OPERATING.items()}
    return found


def _explained(name: str, command: Operating, missing: str) -> TyperCommand:
    """A command that ends by saying how to install what it needs, whatever it is given."""
    remedy = f"`pdtrim {name}` needs {missing}, which is not installed: pip install 'pdtrim[{command.extra}]'"
    return TyperCommand(
        name,
        callback=lambda: fail(remedy),
        help=f"{command.help} Needs `pip install 'pdtrim[{command.extra}]'`.",
        rich_help_panel=PANEL,
        rich_markup_mode="markdown",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
