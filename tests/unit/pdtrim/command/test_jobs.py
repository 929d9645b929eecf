"""The `pdtrim` command against a gateway on a real port, with the worker played by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pdtrim.command import JOBS, app
from pdtrim.command.operating import OPERATING
from pdtrim.contract.jobs import ErrorInfo, StageName
from service.settings import Settings
from tests.gateway import model
from tests.live_gateway import LiveGateway, live

__all__ = ["model"]

Pdtrim = Callable[..., Result]
UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture
def gateway(tmp_path: Path, model: Path) -> Iterator[LiveGateway]:
    settings = Settings(data_dir=tmp_path / "data", allowed_sources=["builtin:", model.as_uri()])
    with live(settings, model) as running:
        yield running


@pytest.fixture
def pdtrim(gateway: LiveGateway) -> Pdtrim:
    return lambda *arguments, **more: CliRunner().invoke(app, [*arguments, "--url", gateway.url], **more)


def test_the_list_of_jobs_fits_a_narrow_terminal_and_says_how_to_begin(gateway: LiveGateway, pdtrim: Pdtrim) -> None:
    narrow = {"env": {"COLUMNS": "80"}}
    assert "There are no jobs yet. `pdtrim submit` makes one" in pdtrim("jobs", **narrow).output
    made = [gateway.played.create() for _ in range(2)]

    lines = pdtrim("jobs", **narrow).output.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[:4] for line in lines[1:3]] == [[job_id, "queued", "1,", "2"] for job_id in made[::-1]]


def test_a_watched_job_ends_with_what_to_do_next(gateway: LiveGateway, pdtrim: Pdtrim) -> None:
    done, cancelled = gateway.played.create(), gateway.played.create()
    gateway.played.run(done)
    pdtrim("cancel", cancelled)

    assert f"`pdtrim download {done} --to model`" in pdtrim("watch", done).output
    assert f"`pdtrim resume {cancelled}`" in pdtrim("watch", cancelled).output


def test_the_version_is_told() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"pdtrim {version('pdtrim')}\n"


def spec_file(gateway: LiveGateway, path: Path) -> Path:
    path.write_text(json.dumps(dict(gateway.played.spec)))
    return path


def test_every_command_teaches_with_an_example() -> None:
    for name in [*(command.__name__ for command in JOBS), *OPERATING.keys() - {"keys"}]:
        shown = CliRunner().invoke(app, [name, "--help"])
        assert shown.exit_code == 0
        example = " ".join(shown.output.replace("│", " ").split()).split("Example:")[1]
        assert f"pdtrim {name}" in example
    assert "pdtrim demo" in CliRunner().invoke(app, []).output


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_submitted_job_is_listed_shown_and_cancelled(
    suffix: str, gateway: LiveGateway, pdtrim: Pdtrim, tmp_path: Path
) -> None:
    job_id = pdtrim("submit", str(spec_file(gateway, tmp_path / f"job.{suffix}"))).output.strip()
    assert job_id in pdtrim("jobs", "--status", "queued").output
    assert pdtrim("jobs", "--status", "running").output == "No job is running.\n"
    assert [job["id"] for job in json.loads(pdtrim("jobs", "--json").output)["data"]] == [job_id]
    shown = pdtrim("show", job_id)
    assert all(stage in shown.output for stage in StageName)
    assert json.loads(pdtrim("show", job_id, "--json").output)["status"] == "queued"
    assert "cancelled" in pdtrim("cancel", job_id).output
    assert json.loads(pdtrim("cancel", job_id, "--json").output)["status"] == "cancelled"


def test_a_job_is_paused_resumed_and_deleted_when_confirmed(gateway: LiveGateway, pdtrim: Pdtrim) -> None:
    job_id = gateway.played.create()
    assert "paused" in pdtrim("pause", job_id).output
    assert json.loads(pdtrim("resume", job_id, "--json").output)["status"] == "queued"
    refused = pdtrim("delete", job_id, "--yes")
    assert (refused.exit_code, "Possible now: pause, cancel" in refused.output) == (1, True)
    pdtrim("pause", job_id)
    for answer in ("n\n", ""):
        unsure = pdtrim("delete", job_id, input=answer)
        assert (unsure.exit_code, f"Delete {job_id}" in unsure.output) == (1, True)
    assert pdtrim("show", job_id).exit_code == 0
    assert "is deleted" in pdtrim("delete", job_id, input="y\n").output
    other = gateway.played.create()
    pdtrim("cancel", other)
    assert json.loads(pdtrim("delete", other, "--yes", "--json").output) == {"id": other, "deleted": True}
    assert "No such job" in pdtrim("show", job_id).output
    assert "No such job" in pdtrim("delete", job_id, "--yes").output


def test_a_job_is_read_from_standard_input_and_printed_as_json(gateway: LiveGateway, pdtrim: Pdtrim) -> None:
    printed = pdtrim("submit", "-", "--json", input=json.dumps(dict(gateway.played.spec)))
    assert json.loads(printed.output)["spec"]["decode"]["remove_blocks"] == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1, 2]", "it must be a mapping"), ("{", "cannot be read"), ("when: 2026-01-01", "cannot be read")],
)
def test_a_specification_that_is_none_is_refused_before_anything_is_sent(
    content: str, message: str, tmp_path: Path
) -> None:
    (path := tmp_path / "job.yaml").write_text(content)
    refused = CliRunner().invoke(app, ["submit", str(path), "--url", UNREACHABLE])
    assert (refused.exit_code, message in refused.output) == (2, True)


def test_what_the_service_refuses_is_said_with_the_field(pdtrim: Pdtrim) -> None:
    refused = pdtrim("submit", "-", input="{model: reference, prefill: {remove_blocks: 3}, decode: {remove_blocks: 2}}")
    assert refused.exit_code == 1
    assert "prefill.remove_blocks" in refused.output


def test_all_that_the_service_refuses_is_said_at_once(gateway: LiveGateway, pdtrim: Pdtrim) -> None:
    wrong = {**gateway.played.spec, "queue": "no-such", "evaluation": {"tasks": ["arc_easy"]}}
    for command in ("submit", "estimate"):
        refused = pdtrim(command, "-", input=json.dumps(wrong))
        assert refused.exit_code == 1
        assert "\n- queue: There is no queue" in refused.output
        assert "\n- evaluation.tasks[0]: A task given by name" in refused.output


def test_a_service_that_is_not_there_is_named() -> None:
    failed = CliRunner().invoke(app, ["jobs", "--url", UNREACHABLE])
    assert failed.exit_code == 1
    assert UNREACHABLE in failed.output
    assert CliRunner().invoke(app, ["jobs", "--url", "nonsense"]).exit_code == 2


def test_watching_prints_every_event_and_ends_as_the_job_does(gateway: LiveGateway, pdtrim: Pdtrim) -> None:
    job_id = gateway.played.create()
    held = gateway.played.claim(job_id, StageName.SCORING)
    gateway.played.report(held, 0.5)
    gateway.played.complete(held)
    pdtrim("cancel", job_id)
    seen = pdtrim("watch", job_id)
    assert seen.exit_code == 1
    assert "scoring 50%: halfway  loss 1.5" in seen.output
    lines = pdtrim("watch", job_id, "--json").output.splitlines()
    assert [json.loads(line)["number"] for line in lines] == list(range(1, len(lines) + 1))


def test_a_failed_job_shows_its_error_and_what_to_do(gateway: LiveGateway, pdtrim: Pdtrim) -> None:
    job_id = gateway.played.create()
    error = ErrorInfo(code="model_unsupported", message="model.safetensors lacks [tensors]", param="model.source")
    gateway.played.fail(job_id, StageName.SCORING, error)
    shown = pdtrim("show", job_id).output
    assert "lacks [tensors]" in shown
    assert "Field: model.source" in shown
    assert "Submit a decoder-only model" in shown
    assert pdtrim("watch", job_id).exit_code == 1


def test_checkpoints_are_listed_and_downloaded(gateway: LiveGateway, pdtrim: Pdtrim, tmp_path: Path) -> None:
    job_id = gateway.played.create()
    files = {"decode/config.json": b"{}", "prefill/config.json": b"[]"}
    for stage in (StageName.SCORING, StageName.REMOVAL, StageName.DISTILLATION):
        gateway.played.store(job_id, stage, {})
    gateway.played.store(job_id, StageName.EXPORT, files)

    assert "decode/config.json" in pdtrim("artifacts", job_id, "--stage", "export").output
    listed = [json.loads(line)["name"] for line in pdtrim("artifacts", job_id, "--json").output.splitlines()]
    assert sorted(listed) == sorted(files)
    printed = pdtrim("download", job_id, "--only", "decode/", "--to", str(tmp_path / "to"))
    assert "1 file in" in printed.output
    assert (tmp_path / "to" / "decode" / "config.json").read_bytes() == b"{}"
    assert not (tmp_path / "to" / "prefill").exists()
    paths = json.loads(pdtrim("download", job_id, "--to", str(tmp_path / "to"), "--json").output)
    assert sorted(Path(path).read_bytes() for path in paths) == [b"[]", b"{}"]
    gateway.played.store(job_id, StageName.EVALUATION, {"decode/config.json": b"{1}", "report.json": b"2"})
    paths = json.loads(pdtrim("download", job_id, "--to", str(tmp_path / "to"), "--json").output)
    assert sorted(Path(path).read_bytes() for path in paths) == [b"[]", b"{1}"]
    missing = pdtrim("download", job_id, "--only", "nothing/")
    assert (missing.exit_code, "pdtrim artifacts" in missing.output) == (1, True)
