"""What a worker says of itself when it starts: its devices, their memory, and their speed in a probe of a second."""

from __future__ import annotations

import logging
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import psutil
import torch
from sqlalchemy.exc import SQLAlchemyError

from pdtrim.contract.devices import Device
from pdtrim.contract.queues import DEFAULT_QUEUE
from service.db import devices
from service.db.session import transaction
from workers.inputs.models import accelerators, device, multiplies_bfloat16, tensor_float_32
from workers.running.attempt import Worker

PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices that are multiplied."""
COPIED_BYTES = 64 << 20
CALLS = 200
PROBE_SECONDS = 0.25
"""For each of four speeds."""
Clock = Callable[[], float]
CPU_NAME = Path("/proc/cpuinfo")
log = logging.getLogger(__name__)


def announce(worker: Worker, queues: Sequence[str]) -> Thread:
    """Tell the database what this worker has, in a thread of its own: nothing has to wait for that."""
    thread = Thread(target=_announce, args=(worker, queues), name="announcing", daemon=True)
    thread.start()
    return thread


def _announce(worker: Worker, queues: Sequence[str]) -> None:
    scratch = worker.settings.scratch_dir
    assert scratch is not None
    try:
        found = look(scratch, memory_bytes=worker.settings.memory_bytes)
        with transaction(worker.database) as session:
            for queue in queues:
                devices.saw(session, found.model_copy(update={"queue": queue}))
    except (SQLAlchemyError, RuntimeError) as error:
        # Nobody's work depends on it: estimates then go by other workers, or none.
        log.warning("what this worker has is not recorded: %s", error)


def look(scratch: Path, queue: str = DEFAULT_QUEUE, *, memory_bytes: int | None = None) -> Device:
    """What is there, of each device's memory what a worker may take, and how fast it is.

    Raises: RuntimeError where a device cannot be used.
    """
    at = device()
    scratch.mkdir(parents=True, exist_ok=True)
    memory = psutil.virtual_memory().total
    of_device = torch.cuda.get_device_properties(at).total_memory if at.type == "cuda" else memory
    taken = of_device if memory_bytes is None else min(of_device, memory_bytes)
    speed = probed(at)
    return Device(
        queue=queue,
        kind="cuda" if at.type == "cuda" else "cpu",
        name=torch.cuda.get_device_name(at) if at.type == "cuda" else _processor(),
        count=max(1, len(accelerators())),
        memory_bytes=taken,
        host_bytes=memory if at.type == "cuda" else taken,
        disk_bytes=shutil.disk_usage(scratch).free,
        flops=speed.flops,
        bfloat16_flops=speed.bfloat16_flops,
        bytes_per_second=speed.bytes_per_second,
        call_seconds=speed.call_seconds,
    )


@dataclass(frozen=True)
class Speed:
    """Of one device."""

    flops: float
    bfloat16_flops: float | None
    bytes_per_second: float
    call_seconds: float


@torch.no_grad()
def probed(at: torch.device, clock: Clock = time.perf_counter) -> Speed:
    """How fast large products, scaling a tensor, and small operations are."""
    copied, small = torch.ones(COPIED_BYTES // 4, device=at), torch.ones(8, device=at)

    def called() -> None:
        for _ in range(CALLS):
            torch.add(small, small)

    copying = _seconds(lambda: copied.mul_(1.0), at, clock)
    return Speed(
        flops=_products(at, torch.float32, clock),
        bfloat16_flops=_products(at, torch.bfloat16, clock) if multiplies_bfloat16() else None,
        bytes_per_second=2 * COPIED_BYTES / copying,
        call_seconds=_seconds(called, at, clock) / CALLS,
    )


def _products(at: torch.device, dtype: torch.dtype, clock: Clock) -> float:
    """Operations a second of products of square matrices, in TensorFloat-32 where healing has it so."""
    size = PRODUCT_SIZE["cuda" if at.type == "cuda" else "cpu"]
    one, other = (torch.randn(size, size, device=at).to(dtype) for _ in range(2))
    with tensor_float_32():
        return 2 * size**3 / _seconds(lambda: torch.mm(one, other), at, clock)


def _seconds(act: Callable[[], object], at: torch.device, clock: Clock) -> float:
    """The least of several tries: others may be at work here."""
    end = clock() + PROBE_SECONDS
    found: list[float] = []
    while len(found) < 3 or clock() < end:
        start = clock()
        act()
        if at.type == "cuda":
            torch.cuda.synchronize(at)
        found.append(clock() - start)
    return min(found)


def _processor() -> str:
    """As Linux names it; elsewhere as Python does."""
    if CPU_NAME.exists():
        named = (line for line in CPU_NAME.read_text().splitlines() if line.startswith("model name"))
        if (line := next(named, None)) is not None:
            return " ".join(line.partition(":")[2].split())[:128]
    return (platform.processor() or platform.machine() or "CPU")[:128]
