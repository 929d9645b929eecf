"""The dashboard in a real browser, against the embedded service: from the login to a second export."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from pdtrim.display import captions
from tests.processes import pdtrim_up

CHROMIUM = Path("/usr/bin/chromium")
KEY = "pdt_operator"
LEAST = {
    "model.source": "reference",
    "calibration.windows": "4",
    "calibration.window_tokens": "16",
    "search.evaluations": "4",
    "distillation.heal_tokens": "64",
    "kv_tokens.ratio": "2",
    "evaluation.windows": "4",
    "metadata": "team=serving",
    "rest": "distillation: {batch_windows: 4}\nevaluation: {speed_tokens: 2, speed_repeats: 1}\n",
}
"""The smallest job that has something in every part of its page."""
JOB_MS = 120_000


@pytest.fixture
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}: apt-get install chromium")
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield started
        started.close()


def test_a_person_prunes_a_model_without_leaving_the_browser(
    browser: Browser, environment: dict[str, str], tmp_path: Path
) -> None:
    with pdtrim_up(environment | {"PDTRIM_API_KEY": KEY}, tmp_path) as url:
        page = browser.new_page(base_url=url)
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if "Security Policy" in message.text else None)

        log_in(page)
        submit(page)
        watch(page)
        first = page.url
        second = cut_another(page)
        cancel_a_third(page)
        page.goto(second)
        expect(page.locator("h1 .badge")).to_have_text("succeeded", timeout=JOB_MS)
        expect(page.locator("#evaluation")).to_be_visible()

        compared = compare(page)
        for path in ("/ui/jobs", "/ui/jobs/new", first, compared, f"{first}/exports/new", "/ui/nothing"):
            page.goto(path)
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                check_accessible(page)
            page.set_viewport_size({"width": 390, "height": 844})
            assert cut_off(page) == [], path
            page.set_viewport_size({"width": 360, "height": 740})
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, path
            if path == "/ui/jobs":
                ends = [
                    box["x"] + box["width"]
                    for one in page.locator("td.state .badge").all()
                    if (box := one.bounding_box())
                ]
                assert len(ends) == 3
                assert max(ends) <= 360
            page.set_viewport_size({"width": 1280, "height": 800})
        page.goto(first)
        page.get_by_role("button", name="Log out").click()
        expect(page).to_have_url(re.compile("/ui/login$"))
        assert faults == []


def check_accessible(page: Page) -> None:
    """No finding of axe that is serious or critical."""
    found = Axe().run(page).response["violations"]
    grave = [one for one in found if one["impact"] in ("serious", "critical")]
    assert not grave, [(one["id"], [node["html"] for node in one["nodes"]][:3]) for one in grave]


def cut_off(page: Page) -> list[str]:
    """What tables of figures that are open have to be moved sideways to be read."""
    regions = page.locator(".table-scroll:has(table.figures)")
    found: list[str] = regions.evaluate_all(
        "all => all.filter(one => one.scrollWidth > one.clientWidth && one.checkVisibility()).map(one => one.ariaLabel)"
    )
    return found


def log_in(page: Page) -> None:
    page.goto("/ui")
    check_accessible(page)
    page.get_by_label("API key").fill("pdt_wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("This key does not open")
    check_accessible(page)
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()


def fill(page: Page, fields: dict[str, str]) -> None:
    """Type into fields, wherever they are folded away."""
    for path, value in fields.items():
        if not page.locator(f'[name="{path}"]').is_visible():
            page.locator("details", has=page.locator(f'[name="{path}"]')).locator("summary").click()
        page.locator(f'[name="{path}"]').fill(value)


def submit(page: Page) -> None:
    """First with mistakes, which are shown at their fields; the estimate follows what is typed."""
    page.get_by_role("link", name="Submit the first one").click()
    page.get_by_label("Name").fill("A first job")
    page.get_by_role("button", name="Quick look").click()
    expect(page.get_by_role("button", name="Quick look")).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_label("Name")).to_have_value("A first job")
    fill(page, {**LEAST, "prefill.remove_blocks": "9", "decode.remove_blocks": "2", "seed": "many"})
    # Enter submits, and does not press a preset.
    page.locator('[name="seed"]').press("Enter")
    expect(page.locator("#field-seed-error")).to_contain_text("integer")
    field = page.locator('[name="prefill.remove_blocks"]')
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#field-prefill-remove_blocks-error")).to_contain_text("may not exceed decode.remove_blocks")
    expect(page.locator("#summary")).to_be_focused()
    check_accessible(page)
    field.fill("1")
    page.locator('[name="seed"]').fill("0")
    expect(page.locator("#estimate").get_by_role("row", name=re.compile("^prefill 11 5,1"))).to_be_visible()
    page.get_by_role("button", name="Submit job").click()


def watch(page: Page) -> None:
    """To the job's end, on one page that is never loaded again."""
    expect(page.locator("h1")).to_contain_text("A first job")
    page.evaluate("window.kept = true")
    check_accessible(page)
    expect(page.locator('[data-stage="removal"] .badge')).to_have_text("succeeded", timeout=JOB_MS)
    expect(page.locator("h1 .badge")).to_have_text("succeeded", timeout=JOB_MS)
    assert page.evaluate("window.kept") is True
    expect(page.locator(".verdict")).to_contain_text("the pair's perplexity is")
    expect(page.locator("#events + .events li").first).to_be_visible()
    for heading in (
        captions.BLOCK_MAP.title,
        captions.FRONTIER.title,
        captions.CONTROLS.title,
        captions.SCORES.title,
        "The search for decode",
    ):
        expect(page.get_by_role("heading", name=heading, exact=True)).to_be_visible()
    expect(page.locator("table.blocks tr.decode td.kept")).to_have_count(10)
    expect(page.get_by_text("sent with the token rule", exact=True)).to_be_visible()
    expect(page.locator("#download-decode")).to_contain_text("pdtrim download job_")
    with page.expect_download() as download:
        page.get_by_text("Files of evaluation (").click()
        page.get_by_role("link", name="report.json").click()
    assert "perplexity" in download.value.path().read_text()
    with page.expect_download() as download:
        page.get_by_role("link", name=re.compile("Download decode checkpoint")).first.click()
    with tarfile.open(download.value.path()) as archive:
        assert "decode/model.safetensors" in archive.getnames()


def compare(page: Page) -> str:
    """The first two jobs of the list; the address of their comparison."""
    page.goto("/ui/jobs")
    for box in page.locator("table.jobs input[type=checkbox]").all()[1:3]:
        box.check()
    page.get_by_role("button", name="Compare chosen").click()
    expect(page.get_by_role("heading", name="Compare two jobs")).to_be_visible()
    expect(page.locator(".verdict")).to_have_count(2)
    return page.url


def cut_another(page: Page) -> str:
    """From a point of the frontier, with the keyboard alone."""
    page.get_by_role("link", name=re.compile("decode without 1 block: .*cut an export here")).focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Cut an export")).to_be_visible()
    expect(page.get_by_text("One unified checkpoint for both halves")).to_be_visible()
    page.get_by_role("button", name="Cut this export").click()
    expect(page.locator('[data-live="head"]')).to_contain_text("Cut from the frontier of")
    return page.url


def cancel_a_third(page: Page) -> None:
    """It waits behind the second for the only worker."""
    page.goto("/ui/jobs/new")
    fill(page, {**LEAST, "prefill.remove_blocks": "1", "decode.remove_blocks": "1", "metadata": ""})
    page.get_by_role("button", name="Submit job").click()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("h1 .badge")).to_have_text("cancelled", timeout=JOB_MS)
    page.goto("/ui/jobs")
    page.get_by_label("State").select_option("cancelled")
    page.get_by_role("button", name="Filter").click()
    expect(page.locator("table.jobs tbody tr")).to_have_count(1)
