"""The `pdtrim` command: submit and follow jobs, or run the service."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pdtrim.command import exports, jobs, manifests, serve, webhooks
from pdtrim.command.operating import OPERATING, operating_commands


class Commands(TyperGroup):
    """The commands below, and those that run the service, which are imported when they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, in the order of the help."""
        return [*super().list_commands(ctx), *OPERATING]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name, or None."""
        return operating_commands().get(cmd_name) if cmd_name in OPERATING else super().get_command(ctx, cmd_name)


app = typer.Typer(
    name="pdtrim",
    cls=Commands,
    help="Prune and distil language models for prefill/decode serving.\n\n"
    "`pdtrim demo` shows everything once. `pdtrim up` runs the service here; the other commands talk to it.\n\n"
    "`pdtrim --install-completion` has bash, zsh, fish and PowerShell complete commands, options and the ids of jobs.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pdtrim {version('pdtrim')}")
        raise typer.Exit


@app.callback()
def main(
    version_wanted: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """What the help says stands at `app`."""


JOBS: tuple[Callable[..., None], ...] = (
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
    serve.serve,
    manifests.manifests,
)
for command in JOBS:
    app.command(rich_help_panel="Jobs")(command)
app.add_typer(webhooks.app, rich_help_panel="Jobs")
