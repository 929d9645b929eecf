"""What the client's answers look like at a prompt and in a notebook: as on a terminal, by the same tables."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType

from pdtrim.contract.estimate import Estimate
from pdtrim.contract.frontier import Frontier
from pdtrim.contract.jobs import Event, Job
from pdtrim.display.jobs import job_page
from pdtrim.display.progress import LiveProgress
from pdtrim.display.rendering import estimate_report, frontier_report

WIDTH = 120
HTML = '<pre style="font-family:Menlo,Consolas,monospace;line-height:1.25;white-space:pre">{code}</pre>'


def html(renderable: RenderableType) -> str:
    """What Rich would print, as HTML."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_jupyter=False)
    console.print(renderable)
    return console.export_html(code_format=HTML, inline_styles=True)


class NotebookJob(Job):
    """A job with a short `repr` and, in a notebook, its stages, error and report."""

    def __repr__(self) -> str:
        spec = self.spec
        return f"<job {self.id} {self.status}: {spec.model.source}, prefill {spec.prefill}, decode {spec.decode}>"

    def _repr_html_(self) -> str:
        return html(job_page(self))


class NotebookFrontier(Frontier):
    """A frontier that is a table in a notebook."""

    def _repr_html_(self) -> str:
        return html(frontier_report(self))


class NotebookEstimate(Estimate):
    """An estimate that is a table in a notebook."""

    def _repr_html_(self) -> str:
        return html(estimate_report(self))


@contextmanager
def live_progress() -> Iterator[Callable[[Event], None]]:
    """What shows a job's events as they happen."""
    with LiveProgress(Console()) as progress:
        yield progress.show
