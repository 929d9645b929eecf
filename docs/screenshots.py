"""Makes docs/images: the dashboard's main views, light and dark, of a service that it starts and stops.

`python docs/screenshots.py` takes a few minutes on two cores and needs Chromium (apt-get install chromium). With
`--phone FOLDER` whole pages as wide as a phone go there too, to be looked at.
"""

from __future__ import annotations

import argparse
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
PHONE = {"width": 390, "height": 844}
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
HEALED: dict[str, Any] = {
    "name": "Half of decode, again",
    "distillation": {"heal_tokens": 400_000, "threshold": 0.965},
    "metadata": {"team": "serving", "try": "2"},
}
"""What is changed in the job that is looked at while it heals."""
CURVE_EVENTS = 12
"""Of healing: as many make a curve."""
TYPED = {"name": "Nightly", "model.source": "reference", "prefill.remove_blocks": "2", "decode.remove_blocks": "4"}


def finished(client: Client, spec: dict[str, Any]) -> Job:
    """The job of a specification, at its end."""
    job_id = client.create(spec).id
    for _ in client.events(job_id):
        pass
    return client.get(job_id)


def healing(client: Client, spec: dict[str, Any]) -> Job:
    """The job of a specification, while it heals."""
    job_id, drawn = client.create(spec).id, 0
    for event in client.events(job_id):
        drawn += "held_out" in event.data
        if drawn == CURVE_EVENTS:
            break
    return client.get(job_id)


def log_in(page: Page) -> None:
    page.goto("/ui/login")
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    page.wait_for_url("**/ui/jobs")


def views(page: Page, folder: Path, finished: Job, other: Job, running: Job) -> None:
    """Takes a picture of every view, named for it and for what the browser prefers; of the whole page on a phone."""
    whole = page.viewport_size == PHONE
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]

        def take(name: str, scheme: str = scheme) -> None:
            page.screenshot(path=folder / f"{name}-{scheme}.png", full_page=whole)

        page.goto(f"/ui/jobs/{running.id}")
        page.evaluate("document.querySelector('#healing').closest('section').scrollIntoView()")
        take("running")
        page.goto("/ui/jobs")
        take("jobs")
        page.goto(f"/ui/jobs/{finished.id}")
        take("job")
        page.evaluate("document.querySelector('#losses').closest('section').scrollIntoView()")
        take("found")
        page.goto(f"/ui/jobs/{finished.id}/exports/new?prefill=3&decode=5")
        take("export")
        page.goto(f"/ui/jobs/compare?job={other.id}&job={finished.id}")
        take("compare")
        page.goto("/ui/jobs/new")
        for name, text in TYPED.items():
            page.locator(f'[name="{name}"]').fill(text)
        page.locator("#estimate table").wait_for()
        take("submit")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--phone", type=Path, help="folder for pictures as wide as a phone")
    phone: Path | None = parser.parse_args().phone
    for made in (IMAGES, phone):
        if made is not None:
            made.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PDTRIM_API_KEY"] = KEY  # For the gateway, which is a process of its own.
        settings = Settings(data_dir=Path(folder) / "data", port=0)
        with Embedded(settings, Path(folder), print) as service, service.client() as client:
            done = [finished(client, SPEC), finished(client, {**SPEC, **LESS})]
            client.cancel(client.create({**SPEC, "priority": "low"}).id)
            running = healing(client, {**SPEC, **HEALED})
            client.create({**SPEC, "name": None, "decode": {"remove_blocks": 4}, "metadata": {"team": "research"}})
            with sync_playwright() as playwright:
                options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
                browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
                page = browser.new_page(base_url=service.url, viewport=SIZE)
                log_in(page)
                views(page, IMAGES, *done, running)
                if phone is not None:
                    page.set_viewport_size(PHONE)
                    views(page, phone, *done, running)
                browser.close()
            client.cancel(running.id)


if __name__ == "__main__":
    main()
