"""Schemathesis against a running gateway: `python -m tests.api_fuzz.run REQUESTS [EXAMPLES]`.

With and without a key in turn, each round with its own seed, until the gateway has answered so many requests.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from pdtrim.contract.jobs import ErrorInfo, StageName
from service.settings import Settings
from tests import servers
from tests.found import plan
from tests.gateway import write_model
from tests.live_gateway import LiveGateway, live

HOOKS = Path(__file__).with_name("hooks.py")
PROGRAM = Path(sysconfig.get_path("scripts")) / "schemathesis"
KEY = "a-key-of-the-operator"
PHASES = "examples,coverage,fuzzing,stateful"
"""All that Schemathesis has."""
UNAUTHENTICATED_EVERY = 4
"""One round in so many is sent without a key, where there is one answer to everything."""


@dataclass(frozen=True)
class Round:
    """What one run of Schemathesis came to."""

    requests: int
    failed: bool
    output: str


@dataclass(frozen=True)
class Target:
    """A gateway that asks for a key, with jobs in several states, one of which has files."""

    gateway: LiveGateway
    job: str
    artifacts: list[str]

    def configuration(self) -> str:
        """Every check and phase is on; what has files is known, as few would guess it."""
        known = [
            f"[dictionaries.{name}]\nvalues = {values}\n"
            for name, values in (("jobs", [self.job]), ("artifacts", self.artifacts))
        ]
        of_job, of_artifact = (
            f'parameters.{name}_id = {{dictionary = "{name}s", probability = 0.8}}\n' for name in ("job", "artifact")
        )
        operations = [
            f'[[operations]]\ninclude-operation-id = "{operation}"\n{parameters}'
            for operation, parameters in (
                ("get_artifact_content", of_job + of_artifact),
                ("head_artifact_content", of_job + of_artifact),
                ("get_frontier", of_job),
                ("create_export", of_job),
            )
        ]
        return "\n".join([f'hooks = "{HOOKS}"\n', *known, *operations])


@contextmanager
def target(settings: Settings, folder: Path) -> Iterator[Target]:
    """A gateway on `settings`."""
    model = write_model(folder / "models" / "tiny")
    # Limits would answer most of it with 429.
    keyed = settings.model_copy(
        update={
            "api_key": SecretStr(KEY),
            "allowed_sources": ["reference", "builtin:", model.parent.as_uri()],
            "rate_limit": "none",
            "failed_auth_limit": "none",
        }
    )
    with live(keyed, model) as gateway:
        played = gateway.played
        played.client.headers["Authorization"] = f"Bearer {KEY}"
        for _ in range(2):
            played.create()
        played.claim(played.create(), StageName.SCORING)
        played.fail(played.create(), StageName.SCORING, ErrorInfo(code="model_unsupported", message="It is none."))
        done = played.create(metadata={"team": "serving"})
        for stage in StageName:
            files = {"report.json": b"{}", "decode/model.safetensors": bytes(1000)}
            played.store(done, stage, files | {"plan.json": plan().model_dump_json().encode()})
        artifacts = played.client.get(f"/v1/jobs/{done}/artifacts").json()["data"]
        yield Target(gateway, done, [artifact["id"] for artifact in artifacts])


def run(target: Target, *, seed: int, examples: int, key: str | None = KEY, phases: str = PHASES) -> Round:
    """One run over all operations, with `examples` for each in every one of `phases`, but for those of coverage."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(target.configuration())
        file.flush()
        command = [str(PROGRAM), "--config-file", file.name, "--no-color", "run", f"{target.gateway.url}/openapi.json"]
        command += ["--checks", "all", "--max-examples", str(examples), "--seed", str(seed), "--request-timeout", "20"]
        command += ["--phases", phases]
        command += ["--generation-database", "none", "--continue-on-failure"]
        command += ["--header", f"Authorization:Bearer {key}"] if key is not None else []
        before = target.gateway.requests
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return Round(target.gateway.requests - before, done.returncode != 0, done.stdout)


def main(requests: int, examples: int = 100) -> int:
    with tempfile.TemporaryDirectory() as folder, servers.postgres() as database, servers.valkey() as broker:
        settings = Settings(data_dir=Path(folder) / "data", database_url=database, broker_url=broker)
        with target(settings, Path(folder)) as found_at:
            sent = failures = rounds = 0
            while sent < requests:
                rounds += 1
                key = None if rounds % UNAUTHENTICATED_EVERY == 0 else KEY
                found = run(found_at, seed=rounds, examples=examples, key=key)
                sent, failures = sent + found.requests, failures + found.failed
                if found.failed:
                    print(found.output)
                what = "failed" if found.failed else "passed"
                print(
                    f"round {rounds}: {found.requests} requests {'with' if key else 'without'} a key {what}", flush=True
                )
    print(f"{sent} requests in {rounds} rounds, of which {failures} failed")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
