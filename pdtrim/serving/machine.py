"""A pair on one machine: three commands, with their ports and devices."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pdtrim.contract.results import Half
from pdtrim.serving.checkpoints import HALVES
from pdtrim.serving.engines import (
    ROUTER,
    SERVER,
    Serving,
    engine_options,
    engine_variables,
    router_options,
)

HERE = "127.0.0.1"


@dataclass(frozen=True)
class Ports:
    """Where everything listens; all but the router's on loopback alone. Tensor-parallel ranks count on from `side`."""

    router: int
    engines: Mapping[Half, int]
    side: Mapping[Half, int]
    """The side channels, over which the engines agree on what is sent."""
    metrics: int
    """The router's own."""

    @property
    def all(self) -> tuple[int, ...]:
        return (self.router, self.metrics, *self.engines.values(), *self.side.values())


def ports_from(first: int) -> Ports:
    """Ports that follow the router's."""
    return Ports(
        router=first,
        engines={"prefill": first + 1, "decode": first + 2},
        side={"prefill": first + 10, "decode": first + 30},
        metrics=first + 3,
    )


@dataclass(frozen=True)
class Machine:
    """Where on this machine a pair is served."""

    python: str
    folders: Mapping[Half, str]
    """The checkpoints; twice the same for a unified one."""
    ports: Ports
    host: str = HERE
    """Where the router listens."""
    gpus: Mapping[Half, str] | None = None
    """What `CUDA_VISIBLE_DEVICES` is; None leaves it."""
    threads: int | None = None
    """Threads that an engine computes with, on a CPU; None leaves it to vLLM."""
    more: tuple[str, ...] = ()
    """Options that both engines get besides."""


@dataclass(frozen=True)
class Command:
    """A process: what is run, with which variables besides those that are set, and where it says that it is well."""

    name: Literal["prefill", "decode", "router"]
    arguments: tuple[str, ...]
    variables: Mapping[str, str]
    health: str

    def shell(self) -> str:
        """As somebody would type it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " \\\n  ".join([*variables, *_lines(self.arguments)])


def _lines(arguments: Sequence[str]) -> list[str]:
    """Each option with its values on a line of its own."""
    lines: list[list[str]] = [[]]
    for argument in arguments:
        if argument.startswith("--"):
            lines.append([])
        lines[-1].append(argument)
    return [shlex.join(line) for line in lines]


def commands(serving: Serving, machine: Machine) -> tuple[Command, Command, Command]:
    """Prefill, decode and router, in the order of their start: the router looks for the engines at once."""
    prefill, decode = (_engine(serving, machine, half) for half in HALVES)
    urls = {half: f"http://{HERE}:{machine.ports.engines[half]}" for half in HALVES}
    router = Command(
        name="router",
        arguments=(
            machine.python,
            *ROUTER,
            *("--host", machine.host),
            *("--port", str(machine.ports.router)),
            *("--prometheus-port", str(machine.ports.metrics)),
            *router_options(serving, prefill=urls["prefill"], decode=urls["decode"]),
        ),
        variables={},
        health=f"http://{reachable(machine.host)}:{machine.ports.router}/health",
    )
    return prefill, decode, router


def _engine(serving: Serving, machine: Machine, half: Half) -> Command:
    port = machine.ports.engines[half]
    together = machine.gpus is not None and machine.gpus["prefill"] == machine.gpus["decode"]
    return Command(
        name=half,
        arguments=(
            machine.python,
            *SERVER,
            *("--model", machine.folders[half]),
            *("--host", HERE),
            *("--port", str(port)),
            *engine_options(serving, half),
            # What vLLM asks to be free when it starts. How much it takes follows from the cache's size.
            *(("--gpu-memory-utilization", "0.45") if together else ()),
            *machine.more,
        ),
        variables={
            **engine_variables(serving),
            **({} if machine.gpus is None else {"CUDA_VISIBLE_DEVICES": machine.gpus[half]}),
            **({} if machine.threads is None else {"OMP_NUM_THREADS": str(machine.threads)}),
            "VLLM_NIXL_SIDE_CHANNEL_HOST": HERE,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(machine.ports.side[half]),
        },
        health=f"http://{HERE}:{port}/health",
    )


def reachable(host: str) -> str:
    """A host that this machine can ask, of an address that may stand for all of them."""
    if host in ("0.0.0.0", "::"):
        return HERE
    return f"[{host}]" if ":" in host else host
