"""The commands of those who run the service. `pdtrim` finds them by the entry point `pdtrim.commands`."""

from __future__ import annotations

import typer

from service.commands import doctor, keys, run

app = typer.Typer(rich_markup_mode="markdown", pretty_exceptions_enable=False)
for command in (run.demo, run.up, run.gateway, run.worker, run.ping, run.reconcile, run.migrate, doctor.doctor):
    app.command(rich_help_panel="Service")(command)
app.add_typer(keys.app, rich_help_panel="Service")
