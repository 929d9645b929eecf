"""Makes docs/images: the dashboard's main views, light and dark, of a service that it starts and stops.

`python docs/screenshots.py` takes a few minutes on two cores and needs Chromium (apt-get install chromium).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from pdtrim.client import Client
from pdtrim.contract.jobs import Job
from service.commands.embedded import Embedded
from service.settings import Settings

IMAGES = Path(__file__).parent / "images"
CHROMIUM = Path("/usr/bin/chromium")
KEY = "pdt_screenshots"
SIZE = {"width": 1200, "height": 720}
SPEC: dict[str, Any] = {
    "name": "Half of decode",
    "model": "reference",
    "prefill": {"remove_blocks": 3},
    "decode": {"remove_blocks": 6},
    "calibration": {"windows": 8, "window_tokens": 64},
    "search": {"evaluations": 60},
    "distillation": {"heal_tokens": 8_192, "threshold": 0.965},
    "kv_tokens": {"ratio": 3},
    "evaluation": {"windows": 8, "speed_tokens": 16},
    "metadata": {"team": "serving"},
}
LESS: dict[str, Any] = {"name": "A sixth of decode", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}}
"""What is changed in the job that it is compared with."""
TYPED = {"name": "Nightly", "model.source": "reference", "prefill.remove_blocks": "2", "decode.remove_blocks": "4"}


def finished(client: Client, spec: dict[str, Any]) -> Job:
    """The job of a specification, at its end."""
    job_id = client.create(spec).id
    for _ in client.events(job_id):
        pass
    return client.get(job_id)


def log_in(page: Page) -> None:
    page.goto("/ui/login")
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    page.wait_for_url("**/ui/jobs")


def views(page: Page, job: Job, other: Job) -> None:
    """Takes a picture of every view, named for it and for what the browser prefers."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]

        def take(name: str, scheme: str = scheme) -> None:
            page.screenshot(path=IMAGES / f"{name}-{scheme}.png")

        page.goto("/ui/jobs")
        take("jobs")
        page.goto(f"/ui/jobs/{job.id}")
        take("job")
        page.evaluate("document.querySelector('#losses').closest('section').scrollIntoView()")
        take("found")
        page.goto(f"/ui/jobs/{job.id}/exports/new?prefill=3&decode=5")
        take("export")
        page.goto(f"/ui/jobs/compare?job={other.id}&job={job.id}")
        take("compare")
        page.goto("/ui/jobs/new")
        for name, text in TYPED.items():
            page.locator(f'[name="{name}"]').fill(text)
        page.locator("#estimate table").wait_for()
        take("submit")


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PDTRIM_API_KEY"] = KEY  # For the gateway, which is a process of its own.
        settings = Settings(data_dir=Path(folder) / "data", port=0)
        with Embedded(settings, Path(folder), print) as service, service.client() as client:
            job = finished(client, SPEC)
            other = finished(client, {**SPEC, **LESS})
            waiting = client.create(
                {**SPEC, "name": "Half of decode, again", "metadata": {"team": "serving", "try": "2"}}
            )
            client.cancel(client.create({**SPEC, "priority": "low"}).id)
            client.create({**SPEC, "name": None, "decode": {"remove_blocks": 4}, "metadata": {"team": "research"}})
            with sync_playwright() as playwright:
                options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
                browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
                page = browser.new_page(base_url=service.url, viewport=SIZE)
                log_in(page)
                views(page, job, other)
                browser.close()
            client.cancel(waiting.id)


if __name__ == "__main__":
    main()
