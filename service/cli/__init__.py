"""The `pdtrim` command: submit and follow jobs, or run the service."""

from __future__ import annotations

from collections.abc import Callable

import typer

from service.cli import doctor, exports, jobs, keys, run, webhooks

app = typer.Typer(
    name="pdtrim",
    help="Prune and distil language models for prefill/decode serving.\n\n"
    "`pdtrim demo` shows everything once. `pdtrim up` runs the service here; the other commands talk to it.\n\n"
    "`pdtrim --install-completion` has bash, zsh, fish and PowerShell complete commands, options and the ids of jobs.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Jobs": (
        exports.estimate,
        jobs.submit,
        jobs.jobs,
        jobs.show,
        jobs.watch,
        jobs.pause,
        jobs.resume,
        jobs.cancel,
        jobs.delete,
        jobs.artifacts,
        jobs.download,
        exports.frontier,
        exports.export,
        exports.compare,
    ),
    "Service": (run.demo, run.up, run.serve, run.worker, run.ping, run.reconcile, run.migrate, doctor.doctor),
}
for panel, commands in PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.add_typer(webhooks.app, rich_help_panel="Jobs")
app.add_typer(keys.app, rich_help_panel="Service")
