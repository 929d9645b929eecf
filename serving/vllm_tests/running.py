"""Real engines of vLLM on this machine's CPU, the router before them, and requests to them."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

BLOCK_SIZE = 32
SEQUENCES = 8
SEQUENCE_TOKENS = 512
BLOCKS = SEQUENCES * SEQUENCE_TOKENS // BLOCK_SIZE + 1
"""As few as decode may have."""
MODEL = "pruned"
START_SECONDS = 900
ANSWER_SECONDS = 240
ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""The worker in the engine's process: on a busy machine two miss each other's messages for 5 s, again and again."""
FIRST_TOKEN = "pdtrim_vllm.first_token:FirstToken"
PLUGIN, NO_PLUGIN = {"VLLM_PLUGINS": "pdtrim"}, {"VLLM_PLUGINS": "none"}
"""Variables of an engine: vLLM loads the plugins that are named, all where none is."""
_candidates = count(int(os.environ.get("PDTRIM_TEST_PORTS", random.randrange(20_000, 30_000))))
"""Below those that the system gives out by itself, of which an engine that starts takes some."""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # With its shared memory UCX polls without rest, a core for each engine.
    "UCX_TLS": "tcp,self",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
}


def free_port() -> int:
    """A port that nothing listens on; from PDTRIM_TEST_PORTS on, where that is given. None is given twice."""
    for port in _candidates:
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")


@dataclass
class Server:
    """A process that answers HTTP, with those that it started."""

    name: str
    command: list[str]
    port: int
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                env={**os.environ, **ENVIRONMENT, **self.environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def signal(self, number: int) -> None:
        """To it and all that it started."""
        assert self.process is not None
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return

    def kill(self) -> None:
        """At once, as a machine that fails."""
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def wait(self) -> None:
        """Raises: AssertionError with the end of the log when it ends, or is not up in time."""
        assert self.process is not None
        deadline = time.monotonic() + START_SECONDS
        while not self.healthy():
            ended = self.process.poll()
            assert ended is None, f"{self.name} ended with {ended}:\n{self.log.read_text()[-6000:]}"
            assert time.monotonic() < deadline, f"{self.name} is not up:\n{self.log.read_text()[-6000:]}"
            time.sleep(1)


def engine(
    folder: Path,
    name: str,
    checkpoint: Path,
    *,
    kv_role: str | None = None,
    transfer: dict[str, Any] | None = None,
    options: Sequence[str] = (),
    blocks: int = 2 * BLOCKS,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Server:
    """An engine that is not started yet. `options` come last, so that they replace what stands before them."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--distributed-executor-backend", ONE_PROCESS]
    command += ["--enforce-eager", "--block-size", str(BLOCK_SIZE), "--max-num-seqs", str(SEQUENCES)]
    command += ["--max-model-len", str(SEQUENCE_TOKENS), "--num-gpu-blocks-override", str(blocks)]
    if kv_role is not None:
        connector = {"kv_connector": "PDTrimConnector", "kv_connector_module_path": "pdtrim_vllm.connector"}
        command += ["--kv-transfer-config", json.dumps({**connector, "kv_role": kv_role, **(transfer or {})})]
    own = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
    return Server(name, [*command, *options], port, folder / f"{name}.log", {**own, **environment})


def router(folder: Path, prefill: Server, decode: Server) -> Server:
    """vllm-router in front of a pair."""
    port = free_port()
    command = [sys.executable, "-m", "vllm_router.launch_router", "--vllm-pd-disaggregation"]
    command += ["--prefill", prefill.url, "--decode", decode.url, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-port", str(free_port())]
    return Server("router", command, port, folder / "router.log")


@contextmanager
def running(*servers: Server) -> Iterator[None]:
    """Servers, all started at once, until the end of the block."""
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait()
        yield
    finally:
        for server in servers:
            if server.process is not None:
                server.kill()


@dataclass(frozen=True)
class ServedPair:
    """A pair at work."""

    prefill: Server
    decode: Server
    router: Server


@dataclass(frozen=True)
class Connector:
    """What carries keys and values from one engine to the other."""

    transfer: Mapping[str, Any]
    """Entries of `--kv-transfer-config`."""
    extra: Mapping[str, Any]
    """Entries of its `kv_connector_extra_config`."""
    decode_options: tuple[str, ...]


PDTRIM = Connector({}, {}, ("--logits-processors", FIRST_TOKEN))
NIXL = Connector(
    {"kv_connector": "NixlConnector", "kv_connector_module_path": None}, {"enforce_handshake_compat": False}, ()
)
"""vLLM's own, which is not to mind that the two models have different names."""


@contextmanager
def served(
    folder: Path,
    checkpoints: tuple[Path, Path],
    *,
    prefill_options: Sequence[str] = (),
    decode_options: Sequence[str] = (),
    lease_seconds: int = 120,
    connector: Connector = PDTRIM,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[ServedPair]:
    """Two engines and the router, up. A busy machine does not always keep vLLM's own lease of 30 s."""
    extra = {"kv_connector_extra_config": {"kv_lease_duration": lease_seconds, **connector.extra}}
    alike: dict[str, Any] = {"transfer": {**connector.transfer, **extra}, "environment": environment}
    prefill = engine(folder, "prefill", checkpoints[0], kv_role="kv_producer", options=prefill_options, **alike)
    options = [*connector.decode_options, *decode_options]
    decode = engine(folder, "decode", checkpoints[1], kv_role="kv_consumer", options=options, blocks=BLOCKS, **alike)
    with running(prefill, decode):
        front = router(folder, prefill, decode)
        with running(front):
            yield ServedPair(prefill, decode, front)


@dataclass(frozen=True)
class Answer:
    """What came back: tokens, or an error as text."""

    tokens: list[int] | None
    error: str = ""
    content: dict[str, Any] = field(default_factory=dict)


def post(url: str, body: dict[str, Any], *, seconds: float = ANSWER_SECONDS) -> Answer:
    """One request for a completion."""
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            content = json.load(answer)
    except urllib.error.HTTPError as error:
        return Answer(None, f"HTTP {error.code}: {error.read().decode(errors='replace')}")
    except (OSError, ValueError) as error:
        return Answer(None, repr(error))
    if "choices" not in content:
        return Answer(None, json.dumps(content))
    return Answer(content["choices"][0].get("token_ids"), content=content)


def greedy(prompt: Any, tokens: int, **more: Any) -> dict[str, Any]:
    """A request for so many tokens, the most probable ones."""
    return {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }


def complete(url: str, prompts: Sequence[list[int]], tokens: int, *, at_once: int = 1) -> list[Answer]:
    """Answers to prompts, so many asked at once."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda prompt: post(url, greedy(prompt, tokens)), prompts))


def metric(server: Server, name: str) -> float:
    """The sum of a metric's samples; 0 before there are any."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0].partition(" ")[0] == name)


def wait_for(condition: Callable[[], bool], *, seconds: float = 120, what: str = "") -> None:
    """Raises: AssertionError when it does not come about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(0.5)


def hand_over(
    pair: ServedPair,
    prompt: list[int],
    tokens: int,
    *,
    decode_prompt: list[int] | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Answer:
    """What a router does: ask prefill, give what it says to decode. Decode may be given another prompt, or later."""
    unknown = dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
    asked = {**unknown, "do_remote_decode": True, "do_remote_prefill": False}
    read = post(pair.prefill.url, greedy(prompt, 1, kv_transfer_params=asked))
    if read.error:
        return read
    meanwhile()
    handed = read.content["kv_transfer_params"]
    return post(pair.decode.url, greedy(decode_prompt or prompt, tokens, kv_transfer_params=handed))
