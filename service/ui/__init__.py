"""The dashboard at /ui: pages for people, made on the server from what the HTTP interface answers.

Handlers (`login`, `jobs`, `submit`, `exports`, `compare`, `downloads`) call the interface's own route functions. What a
page shows is computed by pure functions (`views`, `figures`, `charts`, `forms`) and laid out by templates. Nothing is
loaded from elsewhere, no script or style is inline, and without script all but live progress and copying works.
"""

from __future__ import annotations

from fastapi import FastAPI

from service.ui import compare, downloads, exports, jobs, login, pages, submit


def install(app: FastAPI) -> None:
    """Add the dashboard to a gateway whose errors are answered already."""
    for router in (part.router for part in (login, submit, compare, exports, downloads, jobs)):
        app.include_router(router)
    pages.install(app)
