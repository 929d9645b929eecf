"""Commands that run the service: those of the service itself, or words that say which extra brings them."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.main import get_group
from typer.testing import CliRunner

from pdtrim.command import app
from pdtrim.command.operating import OPERATING, PANEL
from service import commands

ROOT = Path(__file__).parents[4]
WITHOUT_SERVICE = (
    "import sys; sys.modules['sqlalchemy'] = None; from pdtrim.command import app; app(prog_name='pdtrim')"
)


def test_the_service_brings_every_command_that_is_announced() -> None:
    assert get_group(commands.app).commands.keys() == OPERATING.keys()
    shown = CliRunner().invoke(app, ["--help"]).output
    assert all(name in shown.split(PANEL)[1] for name in OPERATING)


def test_every_extra_that_is_named_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {command.extra for command in OPERATING.values()} <= extras.keys()


@pytest.mark.slow
def test_a_command_whose_extra_is_missing_says_how_to_install_it() -> None:
    for name, extra in (("up", "worker"), ("gateway", "service"), ("keys", "service")):
        run = [sys.executable, "-c", WITHOUT_SERVICE, name, "--port", "1", "create"]
        ended = subprocess.run(run, capture_output=True, text=True, check=False)
        assert (ended.returncode, f"pip install 'pdtrim[{extra}]'" in ended.stderr) == (1, True), ended.stderr
    shown = subprocess.run(
        [sys.executable, "-c", WITHOUT_SERVICE, "--help"], capture_output=True, text=True, check=True
    )
    assert "pdtrim[service]" in shown.stdout
    assert "submit" in shown.stdout


def test_what_people_import_loads_neither_the_service_nor_torch() -> None:
    code = "import sys; from pdtrim import Client, JobSpec; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"service", "workers", "torch", "fastapi", "sqlalchemy", "celery", "boto3"} & set(loaded)
