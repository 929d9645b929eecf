"""`pdtrim doctor`: whether what the settings name is there and works."""

from __future__ import annotations

import json
import sys

import typer
from rich.table import Table
from rich.text import Text

from pdtrim.command.connection import Json, console
from service.commands.run import configured

LOOKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "wrong": ("WRONG", "bold red")}


def doctor(as_json: Json = False) -> None:
    """Check this installation, and say what to do about each thing that is wrong. Exit code 1 when something is.

    Looks at the versions of packages, database, migrations, broker, artifact store, device and scratch folder, as
    PDTRIM_ settings name them; run it where the gateway or a worker runs, with the same environment. Changes nothing:
    what it writes into the store, to try that, it deletes.

    Example: `PDTRIM_DATABASE_URL=postgresql://… PDTRIM_BROKER_URL=redis://… pdtrim doctor`
    """
    # As for `gateway`: the S3 library takes its time to import.
    from service.commands.installation import examine

    found = []
    table = Table(box=None, header_style="bold", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    with console.status("Looking …"):
        for finding in examine(configured()):
            found.append(finding)
            label, style = LOOKS[finding.status]
            table.add_row(finding.check, Text(label, style=style), Text(finding.detail))
            if finding.remedy:
                table.add_row("", "", Text(f"→ {finding.remedy}"))
    if as_json:
        sys.stdout.write(json.dumps([one.model_dump() for one in found], indent=2) + "\n")
    else:
        console.print(table)
    if any(one.status == "wrong" for one in found):
        raise typer.Exit(1)
