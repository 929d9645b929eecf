"""The images' build files and the compose file, as far as they can be judged without building anything."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.observing import redaction
from service.settings import Settings
from tests.chart.rendering import ROOT

DOCKER = ROOT / "docker"
DOCKERFILES = [DOCKER / "gateway.Dockerfile", DOCKER / "worker.Dockerfile"]
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
OURS = ("gateway", "reconciler", "worker", "worker-gpu")
KNOWN = {f"PDTRIM_{name.upper()}" for name in Settings.model_fields}
both = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)


def run(program: str, *arguments: object) -> None:
    command: list[str | Path] = [Path(sysconfig.get_path("scripts")) / program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def instructions(dockerfile: Path, name: str) -> list[str]:
    """The arguments of an instruction in the last stage, each in one line."""
    text = dockerfile.read_text().replace("\\\n", " ").rsplit("\nFROM ", 1)[1]
    return re.findall(rf"^\s*{name} +(.*)$", text, re.MULTILINE)


def test_hadolint_finds_nothing() -> None:
    run("hadolint", "--failure-threshold=style", *DOCKERFILES)


def test_the_compose_file_fits_its_schema() -> None:
    run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DOCKER / "compose.yaml")


@both
def test_an_image_is_not_root_and_hears_its_signals(dockerfile: Path) -> None:
    assert instructions(dockerfile, "USER") == ["10001"]
    (entry_point,), (command,) = instructions(dockerfile, "ENTRYPOINT"), instructions(dockerfile, "CMD")[-1:]
    # As JSON lists no shell comes between the process and its signals.
    assert json.loads(entry_point) == ["pdtrim"]
    assert json.loads(command) in (["gateway"], ["worker"])
    assert instructions(dockerfile, "STOPSIGNAL") == ["SIGTERM"]
    assert len(instructions(dockerfile, "HEALTHCHECK")) == 1


@both
def test_an_image_says_what_it_is(dockerfile: Path) -> None:
    (labels,) = instructions(dockerfile, "LABEL")
    for name in ("title", "description", "licenses", "version", "revision", "created"):
        assert f"org.opencontainers.image.{name}=" in labels
    assert "io.pdtrim.sbom.path=" in labels
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert f"VERSION={version}" in instructions(dockerfile, "ARG")


def test_both_images_are_built_in_one_way() -> None:
    """But for what differs: comments, the extras, the index of torch, names and what is run."""
    gateway, worker = (re.sub(r"^ *#.*\n", "", path.read_text(), flags=re.MULTILINE) for path in DOCKERFILES)
    gateway = gateway.replace('EXTRAS="service otel"', 'EXTRAS="worker otel"\nARG TORCH_INDEX=""')
    gateway = gateway.replace(
        "--no-cache-dir \\\n", '--no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \\\n'
    )
    build, rest = gateway.split("LABEL")
    assert worker.startswith(build)
    assert rest[rest.index("RUN useradd") : rest.index("ENV PDTRIM_HOST")] in worker


@both
def test_all_that_a_build_copies_is_in_its_context(dockerfile: Path) -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    text = dockerfile.read_text().replace("\\\n", " ")
    copied = {name for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE) for name in line.split()}
    assert copied == let_in
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize(("extras", "there"), [(["service", "otel"], False), (["worker", "otel"], True)])
def test_requirements_are_those_of_the_project(extras: list[str], there: bool) -> None:
    command: list[str | Path] = [sys.executable, DOCKER / "requirements.py", *extras]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {"fastapi>=0.135", "opentelemetry-sdk"} <= set(printed)
    assert ("torch" in printed) is there


def test_build_tools_are_locked() -> None:
    lines = (DOCKER / "tools.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("name", OURS)
def test_compose_sets_only_what_the_service_reads_and_all_it_needs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables: dict[str, str] = COMPOSE["services"][name]["environment"]
    assert {variable for variable in variables if variable.startswith("PDTRIM_")} <= KNOWN
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= variables.keys()
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    settings = Settings()
    assert settings.artifacts_url == "s3://pdtrim/artifacts"
    assert (settings.api_key is not None) is (name == "gateway")


@pytest.mark.parametrize("name", OURS)
def test_the_trials_keys_leave_log_lines_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is a word of theirs would be masked in all of them."""
    for variable, value in COMPOSE["services"][name]["environment"].items():
        monkeypatch.setenv(variable, re.sub(r"\$\{\w+:-(.*?)\}", r"\1", value))
    redaction._known.cache_clear()
    try:
        for line in (
            "Task pdtrim.removal received",
            "deleted /var/lib/pdtrim/scratch",
            "s3://pdtrim/artifacts at store:8333",
        ):
            assert redaction.redact(line) == line
        assert redaction.redact("signed with pdtrim-trial-secret") == f"signed with {redaction.MASK}"
    finally:
        redaction._known.cache_clear()


@pytest.mark.parametrize("name", OURS)
def test_compose_hardens_our_containers(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_compose_has_a_gpu_only_when_asked_and_gives_workers_time_to_hand_back() -> None:
    services = COMPOSE["services"]
    assert services["worker-gpu"]["profiles"] == ["gpu"]
    assert all("profiles" not in services[name] for name in services.keys() - {"worker-gpu"})
    assert "TORCH_INDEX" not in services["worker-gpu"]["build"].get("args", {})
    grace = int(services["worker"]["stop_grace_period"].removesuffix("s"))
    assert grace >= Settings.model_fields["shutdown_seconds"].default + 30
    volumes = {
        volume.split(":")[0]
        for service in services.values()
        for volume in service.get("volumes", [])
        if not volume.startswith("$")
    }
    assert volumes == COMPOSE["volumes"].keys()
