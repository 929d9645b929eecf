"""The dashboard's pages as a browser without script gets them: who may see and do what, and what errors look like."""

from __future__ import annotations

import io
import re
import tarfile
from base64 import urlsafe_b64decode
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from fastapi import Response
from fastapi.testclient import TestClient
from pydantic import SecretStr
from starlette.datastructures import Headers

from pdtrim.contract.access import Scope
from pdtrim.contract.jobs import ErrorInfo, StageName
from pdtrim.contract.results import DistillationResult, Result, Sample
from service.api.sessions import Session, Sessions
from service.db import keys, stages
from service.db.session import transaction
from service.settings import Settings
from tests.found import RESULTS
from tests.gateway import Gateway, serve
from tests.unit.service.ui.found import COSINE, PLAN, REMOVAL, SEARCH

KEY = "pdt_schlüssel"


@pytest.fixture
def locked(gateway_settings: Settings, model: Path) -> Iterator[Gateway]:
    with serve(gateway_settings.model_copy(update={"api_key": SecretStr(KEY)}), model) as running:
        # As bytes: what is no ASCII has no one way into a header.
        running.client.headers.update({b"authorization": f"Bearer {KEY}".encode()})
        yield running


@pytest.fixture
def unlocked(gateway_settings: Settings, model: Path) -> Iterator[Gateway]:
    with serve(gateway_settings, model) as running:
        yield running


class Browser:
    """Keeps cookies, sends forms with the token that their page has, and follows no redirect."""

    def __init__(self, gateway: Gateway) -> None:
        self.client = TestClient(gateway.app, follow_redirects=False, raise_server_exceptions=False)

    def get(self, path: str, **headers: str) -> httpx2.Response:
        return self.client.get(path, headers=headers)

    def post(self, page: str, path: str, **fields: str) -> httpx2.Response:
        found = re.search(r'name="csrf" value="([^"]+)"', self.get(page).text)
        return self.client.post(path, data={"csrf": "" if found is None else found[1], **fields})

    def login(self, key: str) -> httpx2.Response:
        return self.post("/ui/login", "/ui/login", key=key, next="/ui/jobs/new")


def make_key(gateway: Gateway, scope: Scope, project: str = "default") -> str:
    with transaction(gateway.database) as session:
        return keys.create(session, project=project, name="test", scopes=[scope])[1]


def test_a_key_opens_a_session_in_a_cookie_that_scripts_and_other_sites_cannot_use(locked: Gateway) -> None:
    browser = Browser(locked)
    away = browser.get("/ui/jobs?status=failed")
    assert (away.status_code, away.headers["location"]) == (303, "/ui/login?next=/ui/jobs%3Fstatus%3Dfailed")

    refused = browser.login("wrong")
    assert refused.status_code == 401
    assert "This key does not open" in refused.text

    opened = browser.login(KEY)
    assert (opened.status_code, opened.headers["location"]) == (303, "/ui/jobs/new")
    cookie = opened.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    assert "Secure" not in cookie
    assert browser.get("/ui/jobs").status_code == 200

    # Reading under /v1 works with the cookie, as downloads and event streams need; changing does not.
    assert browser.get("/v1/jobs").status_code == 200
    assert browser.client.post("/v1/jobs", json=dict(locked.spec)).status_code == 401

    left = browser.post("/ui/jobs", "/ui/logout")
    assert left.headers["location"] == "/ui/login"
    assert browser.get("/ui/jobs").status_code == 303


def test_the_cookie_is_secure_where_the_browser_came_by_https(locked: Gateway) -> None:
    response = Browser(locked).get("/ui/login", **{"X-Forwarded-Proto": "https"})
    assert "Secure" in response.headers["set-cookie"].split("; ")


def test_a_revoked_key_ends_the_session_and_guessing_has_its_limit(locked: Gateway) -> None:
    browser, key = Browser(locked), make_key(locked, Scope.ADMIN)
    assert browser.login(key).status_code == 303
    with transaction(locked.database) as session:
        keys.revoke(session, key.split("_")[1])
    assert browser.get("/ui/jobs").headers["location"] == "/ui/login"
    answers = [browser.login("wrong").status_code for _ in range(40)]
    assert answers[0] == 401
    assert answers[-1] == 429


def test_a_form_without_its_sessions_token_does_nothing(unlocked: Gateway) -> None:
    browser, job = Browser(unlocked), unlocked.create()
    for fields in ({}, {"csrf": "guessed"}, {"csrf": Session().csrf}):
        browser.get("/ui/jobs")
        response = browser.client.post(f"/ui/jobs/{job}/cancel", data=fields)
        assert response.status_code == 403
        assert "made in another session" in response.text
    assert unlocked.client.get(f"/v1/jobs/{job}").json()["status"] == "queued"


def test_a_link_from_another_site_neither_logs_out_nor_asks_for_the_key(locked: Gateway) -> None:
    # The browser keeps a strict cookie back at first.
    page = Browser(locked).get("/ui/jobs", **{"Sec-Fetch-Site": "cross-site"})
    assert page.status_code == 200
    assert 'http-equiv="refresh"' in page.text
    assert "set-cookie" not in page.headers


def test_cookies_of_another_secret_or_an_old_login_are_no_sessions_and_show_no_key() -> None:
    secret = SecretStr("a" * 32)

    def cookie(session: Session) -> Headers:
        response = Response()
        Sessions(secret).write(response, session, secure=False)
        return Headers({"cookie": response.headers["set-cookie"].split(";")[0]})

    sent = cookie(session := Session("pdt_key"))
    assert Sessions(secret).read(sent) == session
    assert Sessions(SecretStr("b" * 32)).read(sent) is None
    assert Sessions(secret).read(cookie(Session("pdt_key", since=0.0))) is None
    assert Sessions(secret).read(Headers({"cookie": sent["cookie"][:-2]})) is None
    assert b"pdt_key" not in b"".join(
        urlsafe_b64decode(part + "==") for part in sent["cookie"].split("=")[1].split(".")
    )


def test_a_key_that_only_reads_sees_no_buttons_and_may_not_press_them(locked: Gateway) -> None:
    browser, job = Browser(locked), locked.create()
    browser.login(make_key(locked, Scope.READ))
    page = browser.get(f"/ui/jobs/{job}").text
    assert "Log out" in page
    assert "Cancel" not in page
    refused = browser.post(f"/ui/jobs/{job}", f"/ui/jobs/{job}/cancel")
    assert refused.status_code == 403
    assert "The API key does not allow this" in refused.text

    stranger = Browser(locked)
    stranger.login(make_key(locked, Scope.ADMIN, project="other"))
    assert stranger.get(f"/ui/jobs/{job}").status_code == 404


def test_pages_allow_no_inline_script_or_style_and_have_none(unlocked: Gateway) -> None:
    browser, job = Browser(unlocked), unlocked.create()
    pages = [browser.get(path) for path in ("/ui/jobs", "/ui/jobs/new", "/ui/login", f"/ui/jobs/{job}", "/ui/nothing")]
    assert [page.status_code for page in pages] == [200, 200, 200, 200, 404]
    for page in pages:
        policy = page.headers["content-security-policy"]
        assert "unsafe" not in policy
        assert {"default-src 'none'", "script-src 'self'", "style-src 'self'"} <= set(policy.split("; "))
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! src=\"/ui/)|(src|href)=\"(https?:)?//", page.text)
    assert browser.get("/ui/static/live.js").status_code == 200


def test_jobs_are_filtered_and_paged(unlocked: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.ui.jobs.PAGE", 2)
    made = [unlocked.create(metadata={"n": str(n)}) for n in range(3)]
    unlocked.client.post(f"/v1/jobs/{made[0]}/cancel")
    browser = Browser(unlocked)

    def shown(path: str) -> list[str]:
        return re.findall(r'href="/ui/jobs/(job_\w+)"', browser.get(path).text)

    assert shown("/ui/jobs") == made[:0:-1]
    (older,) = re.findall(r'rel="next" href="([^"]+)"', browser.get("/ui/jobs").text)
    assert shown(older.replace("&amp;", "&")) == [made[0]]
    assert shown("/ui/jobs?status=cancelled") == [made[0]]
    assert shown("/ui/jobs?label=n%3D1") == [made[1]]
    assert "key=value" in browser.get("/ui/jobs?label=n").text


def test_the_form_submits_once_and_says_at_the_field_what_is_wrong(unlocked: Gateway) -> None:
    browser = Browser(unlocked)
    fields = {"model.source": unlocked.spec["model"], "prefill.remove_blocks": "1", "once": "1"}
    wrong = browser.post("/ui/jobs/new", "/ui/jobs", **fields, **{"decode.remove_blocks": "6"})
    assert wrong.status_code == 422
    assert re.search(
        r'id="field-decode-remove_blocks-error">decode.remove_blocks is 6, but the model has 6', wrong.text
    )
    assert 'name="decode.remove_blocks" aria-describedby="field-decode-remove_blocks-error' in wrong.text

    estimated = browser.post("/ui/jobs/new", "/ui/jobs/estimate", **fields, **{"decode.remove_blocks": "2"})
    assert estimated.status_code == 200
    assert "llama" in estimated.text
    assert unlocked.client.get("/v1/jobs").json()["data"] == []

    first = browser.post("/ui/jobs/new", "/ui/jobs", **fields, **{"decode.remove_blocks": "2"})
    again = browser.post("/ui/jobs/new", "/ui/jobs", **fields, **{"decode.remove_blocks": "2"})
    assert first.status_code == 303
    assert first.headers["location"] == again.headers["location"]
    assert len(unlocked.client.get("/v1/jobs").json()["data"]) == 1


def test_a_jobs_page_shows_what_was_found_and_what_an_export_would_give_up(unlocked: Gateway) -> None:
    job = unlocked.create(decode={"remove_blocks": 3})
    play(unlocked, job, StageName.SCORING, RESULTS[StageName.SCORING].model_copy(update={"cosine": COSINE}))
    files = {"plan.json": PLAN.model_dump_json().encode(), "search.json": SEARCH.model_dump_json().encode()}
    play(unlocked, job, StageName.REMOVAL, REMOVAL, files)
    browser = Browser(unlocked)
    page = browser.get(f"/ui/jobs/{job}").text
    assert "block 3 is distilled into block 1" in page
    for heading in ("Loss for every number of blocks", "The search for decode", "What each block is worth"):
        assert f"<h3>{heading}</h3>" in page

    export = browser.get(f"/ui/jobs/{job}/exports/new?prefill=1&decode=2").text
    assert "0.3000 for the pair" in export
    apart = browser.get(f"/ui/jobs/{job}/exports/new?prefill=0&decode=2").text
    assert "were not measured together" in apart
    assert "beside a prefill half that gives up 1, where it lost 0.3000" in apart
    assert "for the pair on continuations" not in apart
    impossible = browser.get(f"/ui/jobs/{job}/exports/new?prefill=1&decode=5")
    assert impossible.status_code == 422
    assert "no set of 5 blocks" in impossible.text
    cut = browser.post(f"/ui/jobs/{job}/exports/new", f"/ui/jobs/{job}/exports", prefill="1", decode="2", name="cut")
    assert "<h1>cut " in browser.get(cut.headers["location"]).text
    assert f'Cut from the frontier of <a href="/ui/jobs/{job}"' in browser.get(cut.headers["location"]).text
    backwards = browser.post(f"/ui/jobs/{job}/exports/new", f"/ui/jobs/{job}/exports", prefill="1", decode="0")
    assert backwards.status_code == 422
    assert "may not exceed" in backwards.text

    unlocked.app.state.store.delete_prefix(f"jobs/{job}")
    without = browser.get(f"/ui/jobs/{job}")
    assert without.status_code == 200
    assert "no longer has their files" in without.text
    assert "block 3 is distilled into block 1" in without.text


def test_a_failed_job_says_why_and_what_to_do_and_a_refusal_is_shown_on_its_page(unlocked: Gateway) -> None:
    job, browser = unlocked.create(), Browser(unlocked)
    unlocked.fail(job, StageName.SCORING, ErrorInfo(code="out_of_memory", message="<b>CUDA</b> ran out"))
    page = browser.get(f"/ui/jobs/{job}").text
    assert "&lt;b&gt;CUDA&lt;/b&gt; ran out" in page
    assert "Resume it on a worker with more memory" in page
    refused = browser.post(f"/ui/jobs/{job}", f"/ui/jobs/{job}/pause")
    assert refused.status_code == 409
    assert "Possible now: resume, delete" in refused.text
    resumed = browser.post(f"/ui/jobs/{job}", f"/ui/jobs/{job}/resume")
    assert resumed.headers["location"] == f"/ui/jobs/{job}"
    assert unlocked.client.get(f"/v1/jobs/{job}").json()["status"] == "queued"


def test_a_job_is_shown_by_its_name_whatever_stands_in_it(unlocked: Gateway) -> None:
    job, browser = unlocked.create(name="<script>alert(1)</script> & co"), Browser(unlocked)
    other = unlocked.create()
    for path in ("/ui/jobs", f"/ui/jobs/{job}", f"/ui/jobs/compare?job={job}&job={other}", f"/ui/jobs/new?of={job}"):
        page = browser.get(path)
        assert page.status_code == 200
        assert "<script>alert" not in page.text
        assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in page.text
    assert unlocked.client.post("/v1/jobs", json={**unlocked.spec, "name": "two\nlines"}).status_code == 422


def test_a_finished_job_begins_with_what_it_saves_and_costs(unlocked: Gateway) -> None:
    job, browser = unlocked.create(), Browser(unlocked)
    assert 'id="verdict"' not in browser.get(f"/ui/jobs/{job}").text
    unlocked.run(job)
    page = browser.get(f"/ui/jobs/{job}").text
    assert page.index("Much quality was lost") < page.index("next token, decode") < page.index('id="progress"')
    assert "+22.1%" in browser.get("/ui/jobs").text


def test_what_the_dense_model_and_the_pair_say_stands_beside_each_other(unlocked: Gateway) -> None:
    job, browser = unlocked.create(), Browser(unlocked)
    sample = Sample(prompt="def f(x):", continuations={"dense": "\n    return <b>x", "pair": " pass"})
    for stage in StageName:
        samples = {"samples": [sample]} if stage == StageName.EVALUATION else {}
        play(unlocked, job, stage, RESULTS[stage].model_copy(update=samples))
    page = browser.get(f"/ui/jobs/{job}").text
    assert "<h3>To be read</h3>" in page
    # A parser drops a line break right behind the tag.
    assert "<pre>\n\n    return &lt;b&gt;x</pre>" in page
    assert page.index("def f(x):") < page.index("<dt>dense</dt>") < page.index("<dt>pair</dt>") < page.index(" pass")


def test_a_waiting_job_says_how_many_go_first_and_a_running_one_where(unlocked: Gateway) -> None:
    browser, jobs = Browser(unlocked), [unlocked.create() for _ in range(3)]
    assert "2 stages are ahead of it in the queue default." in browser.get(f"/ui/jobs/{jobs[2]}").text
    assert "1 stage is ahead of it" in browser.get(f"/ui/jobs/{jobs[1]}").text
    assert "It is the next that a worker of the queue default takes." in browser.get(f"/ui/jobs/{jobs[0]}").text
    unlocked.claim(jobs[0], StageName.SCORING)
    page = browser.get(f"/ui/jobs/{jobs[0]}").text
    assert "runs on test" in page
    assert "queue default takes" not in page
    stage = unlocked.client.get(f"/v1/jobs/{jobs[0]}").json()["stages"][0]
    assert stage["worker"] == "test"


@pytest.mark.slow
def test_healing_is_drawn_while_it_runs_and_after_it(unlocked: Gateway) -> None:
    job, browser = unlocked.create(), Browser(unlocked)
    for stage in (StageName.SCORING, StageName.REMOVAL):
        unlocked.complete(unlocked.claim(job, stage))
    claim = unlocked.claim(job, StageName.DISTILLATION)
    for step in range(1, 1001):
        data = {"half": "prefill", "step": step, "steps": 1200, "loss": 2 / step, "held_out": 1.5}
        with transaction(unlocked.database) as session:
            stages.record_progress(session, claim, progress=step / 1200, message="Healing.", data=data)
    for path in (f"/ui/jobs/{job}", f"/ui/jobs/{job}/progress"):
        page = browser.get(path).text
        assert "<h3>Healing of prefill</h3>" in page
        assert "Step 1000 of 1200." in page
        assert (
            '<span class="number">step <b>1000 of 1200</b></span> <span class="number">loss <b>0.002</b></span>' in page
        )
        assert page.count("<circle") < 1000
    parts = re.findall(r'data-live="(\w+)"', browser.get(f"/ui/jobs/{job}/progress").text)
    assert parts == ["stages", "healing", "events"]

    healing = {"before": 1.5, "after": 1.25, "steps": 1200, "kept": "distilled"}
    unlocked.complete(claim, result=DistillationResult.model_validate({"enabled": True, "prefill": healing}))
    assert (
        "Held-out loss 1.5000 → 1.2500 in 1200 steps: distilled weights are kept."
        in browser.get(f"/ui/jobs/{job}").text
    )


def test_two_jobs_are_compared_and_none_of_another_project(locked: Gateway) -> None:
    mine, browser = [locked.create(name=name) for name in ("one", "two")], Browser(locked)
    browser.login(make_key(locked, Scope.READ))
    locked.run(mine[0])
    empty = browser.get("/ui/jobs/compare").text
    assert empty.count("<option") == 2 * (1 + 2)
    page = browser.get(f"/ui/jobs/compare?job={mine[0]}&job={mine[1]}")
    assert page.status_code == 200
    assert "It was not evaluated yet." in page.text
    assert "What differs" in page.text
    assert "<td>succeeded</td><td>queued</td>" in page.text
    three = browser.get(f"/ui/jobs/compare?job={mine[0]}&job={mine[1]}&job={mine[0]}&job=job_{'0' * 32}")
    assert "Two jobs are compared at a time" in three.text

    for path in ("/ui/jobs/compare?job=%00", "/ui/jobs/new?of=%00"):
        assert browser.get(path).status_code == 404

    stranger = Browser(locked)
    stranger.login(make_key(locked, Scope.ADMIN, project="other"))
    for path in (f"/ui/jobs/compare?job={mine[0]}&job={mine[1]}", f"/ui/jobs/new?of={mine[0]}"):
        away = stranger.get(path)
        assert away.status_code == 404
        assert "succeeded" not in away.text
    assert stranger.get(f"/ui/jobs/{mine[0]}/checkpoints/decode.tar").status_code == 404


def test_a_checkpoint_is_downloaded_as_one_archive_of_its_files(unlocked: Gateway) -> None:
    job, browser = unlocked.create(), Browser(unlocked)
    for stage in (StageName.SCORING, StageName.REMOVAL, StageName.DISTILLATION):
        unlocked.complete(unlocked.claim(job, stage))
    files = {
        "decode/config.json": b"{}",
        "decode/README.md": b"card",
        "decode/" + "n" * 120: b"x" * 1500,
        "prefill/a": b"",
    }
    unlocked.store(job, StageName.EXPORT, files)
    unlocked.store(job, StageName.EVALUATION, {"decode/README.md": b"card with numbers", "report.html": b"<p>"})
    page = browser.get(f"/ui/jobs/{job}").text
    assert re.findall(r"Download ([\w ]+) <span", page) == ["prefill checkpoint", "decode checkpoint", "report"]

    answer = browser.get(f"/ui/jobs/{job}/checkpoints/decode.tar")
    assert len(answer.content) == int(answer.headers["content-length"])
    assert answer.headers["content-disposition"].startswith("attachment")
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        held = {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]
    assert held == {
        "decode/config.json": b"{}", "decode/README.md": b"card with numbers", "decode/" + "n" * 120: b"x" * 1500,
    }  # fmt: skip
    assert browser.get(f"/ui/jobs/{job}/checkpoints/unified.tar").status_code == 404
    unlocked.app.state.store.delete_prefix(f"jobs/{job}/export")
    assert browser.get(f"/ui/jobs/{job}/checkpoints/decode.tar").status_code == 404


def test_a_failed_job_is_edited_and_submitted_again(unlocked: Gateway) -> None:
    job, browser = unlocked.create(name="first try", search={"protect": [0]}), Browser(unlocked)
    error = ErrorInfo(code="invalid_request", message="too few windows", param="calibration.windows")
    unlocked.fail(job, StageName.SCORING, error)
    assert f'href="/ui/jobs/new?of={job}">Edit a copy' in browser.get(f"/ui/jobs/{job}").text
    page = browser.get(f"/ui/jobs/new?of={job}").text
    assert "Why that job failed" in page
    assert re.search(r'id="field-calibration-windows-error">too few windows', page)
    assert re.search(r'name="name"[^>]* value="first try"', page)
    assert "protect:" in page
    assert "would be refused" not in page


def test_a_preset_fills_in_the_form_and_keeps_what_was_typed(unlocked: Gateway) -> None:
    page = Browser(unlocked).post("/ui/jobs/new", "/ui/jobs/preset", preset="quick", name="mine").text
    assert re.search(r'name="name"[^>]* value="mine"', page)
    assert re.search(r'name="distillation.heal_tokens"[^>]* value="16384"', page)
    assert 'value="quick" aria-pressed="true"' in page
    assert page.count('aria-pressed="true"') == 1


def test_all_that_the_checks_find_is_shown_at_once(unlocked: Gateway) -> None:
    fields = {
        "model.source": unlocked.spec["model"], "prefill.remove_blocks": "1", "decode.remove_blocks": "6",
        "queue": "no-such", "data.source": "s3://elsewhere/text", "calibration.window_tokens": "2048",
    }  # fmt: skip
    page = Browser(unlocked).post("/ui/jobs/new", "/ui/jobs", **fields)
    assert page.status_code == 422
    faulty = re.findall(r'class="error" id="field-([\w-]+)-error"', page.text)
    assert faulty == ["decode-remove_blocks", "data-source", "calibration-window_tokens", "queue"]


def play(gateway: Gateway, job: str, stage: StageName, result: Result, files: dict[str, bytes] | None = None) -> None:
    """Play a queued stage that finds this and leaves these files."""
    metrics = result.model_dump(mode="json")
    claim, recorded = gateway.claim(job, stage), []
    for name, content in (files or {}).items():
        key = f"jobs/{job}/{stage.value}/1/{name}"
        stored = gateway.app.state.store.put_bytes(key, content)
        recorded.append(stages.NewArtifact(name=name, key=key, **vars(stored)))
    with transaction(gateway.database) as session:
        stages.complete(session, claim, artifacts=recorded, metrics=metrics, versions={})
