"""A job's progress as it happens: bars for its stages on a terminal or in a notebook, a line an event elsewhere."""

from __future__ import annotations

from datetime import UTC, datetime

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from pdtrim.contract.jobs import Event, StageName
from pdtrim.display.events import numbers
from pdtrim.display.jobs import when


class TookColumn(ProgressColumn):
    """How long a stage has run, from its events: right also when a job is looked at later."""

    def render(self, task: Task) -> Text:
        begun, ended = task.fields["begun"], task.fields["ended"]
        seconds = 0 if begun is None else max(0, int(((ended or datetime.now(UTC)) - begun).total_seconds()))
        return Text(f"{seconds // 60}:{seconds % 60:02}", style="progress.elapsed")


class LiveProgress:
    """Context manager; `show` takes in the events one by one."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal or console.is_jupyter
        self._progress = Progress(
            TextColumn("{task.fields[stage]:<12}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TookColumn(),
            TextColumn(
                "{task.description}", style="dim", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")
            ),
            console=console,
        )
        self._bars: dict[StageName, TaskID] = {}
        self._begun: dict[StageName, datetime] = {}

    def __enter__(self) -> LiveProgress:
        if self._live:
            for name in StageName:
                self._bars[name] = self._progress.add_task("", stage=name, total=1.0, begun=None, ended=None)
            self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._live:
            self._progress.stop()

    def show(self, event: Event) -> None:
        """Take in one event."""
        if not self._live:
            self._print_line(event)
        elif event.stage is None:
            if not event.type.endswith(("created", "succeeded")):
                self._console.print(Text(event.message), highlight=False)
        else:
            self._move_bar(event, event.stage)

    def _print_line(self, event: Event) -> None:
        share = "" if event.progress is None else f" {event.progress:.0%}"
        line = f"{when(event.created_at)} {event.stage or 'job'}{share}: {event.message}{_figures(event)}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _move_bar(self, event: Event, stage: StageName) -> None:
        begun = self._begun.setdefault(stage, event.created_at)
        done = 1.0 if event.type == "stage.succeeded" else event.progress
        text = "" if event.type == "stage.succeeded" else event.message + _figures(event)
        ended = event.created_at if event.type in ("stage.succeeded", "stage.failed") else None
        self._progress.update(self._bars[stage], completed=done, description=text, begun=begun, ended=ended)


def _figures(event: Event) -> str:
    if event.type != "stage.progress":
        return ""
    return "".join(f"  {name} {said}" for name, said in numbers(event) if name != "done")
