"""Which workers have room for a job: those of its queue, or, where it names none, of the first that has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pdtrim.contract.devices import Device
from pdtrim.contract.errors import TooLittleMemory
from pdtrim.contract.jobs import StageName
from pdtrim.contract.spec import JobSpec
from service.checking.memory import StageMemory, checkpoints_of, stage_memory
from service.checking.shape import ModelShape, shape_of
from service.checking.storing import disk_bytes
from service.sources import ModelDescription

ASSUMED = Device(
    queue="",
    kind="cuda",
    name="one GPU of 80 GB, assumed",
    count=1,
    memory_bytes=80 * 10**9,
    host_bytes=10**12,
    disk_bytes=10**13,
    flops=2e14,
    bfloat16_flops=4e14,
    bytes_per_second=2e12,
    call_seconds=5e-6,
)
"""What estimates are said of where no worker has started yet."""
GIGABYTE = 10**9
STRONGER = "Start a worker with more"
REMEDIES: Mapping[StageName, str] = {
    StageName.DISTILLATION: "Train adapters with distillation.trainable: lora, give smaller batches or shorter "
    "windows, or start a worker with more memory"
}


@dataclass(frozen=True)
class Lack:
    """What the workers of a queue have too little of."""

    device: Device
    stage: StageName | None
    """The stage that would take it; None for the files of all."""
    what: str
    needed: int
    there: int

    def __str__(self) -> str:
        doing = "The job's files" if self.stage is None else f"Its {self.stage} stage"
        remedy = REMEDIES.get(self.stage, STRONGER) if self.stage else STRONGER
        return (
            f"{doing} would take {self.needed / GIGABYTE:.1f} GB of {self.what}, and the workers of the queue "
            f"{self.device.queue} have {self.there / GIGABYTE:.1f} GB ({self.device.name}). {remedy}."
        )

    @property
    def share(self) -> float:
        """Of what is there."""
        return self.needed / self.there

    @property
    def param(self) -> str:
        """The field of the specification that is about it."""
        return "distillation.trainable" if self.stage == StageName.DISTILLATION else "model.source"


@dataclass(frozen=True)
class Placement:
    """Where a job goes, and what its stages take there."""

    queue: str
    device: Device | None
    """The one with the least memory of the queue's; None where nothing is known of its workers."""
    stages: Mapping[StageName, StageMemory]
    lack: Lack | None = None
    """Why no worker has room for it."""


def placed(spec: JobSpec, model: ModelDescription, devices: Sequence[Device], queues: Sequence[str]) -> Placement:
    """The first of `queues`, or the one that the job names, whose workers have room for all stages.

    Of a queue none of whose workers is known anything may be expected. Where none has room, the one that lacks least.
    """
    shape = shape_of(model)
    made = [] if shape is None else checkpoints_of(spec, shape)
    found: list[Placement] = []
    for queue in [spec.queue] if spec.queue is not None else queues:
        there = [device for device in devices if device.queue == queue]
        # Any of a queue's workers may take any stage.
        device = min(there, key=lambda one: (one.memory_bytes * one.count, one.host_bytes), default=None)
        stages = {} if shape is None else stage_memory(spec, shape, made, device or ASSUMED)
        lacks = [] if shape is None or device is None else list(_lacking(spec, shape, device, stages))
        found.append(Placement(queue, device, stages, max(lacks, key=lambda lack: lack.share, default=None)))
        if not lacks:
            return found[-1]
    return min(found, key=lambda one: one.lack.share if one.lack else 0.0)


def check_room(placement: Placement) -> None:
    """Raises: TooLittleMemory, with the number, where no worker has room."""
    if placement.lack is not None:
        raise TooLittleMemory(str(placement.lack), param=placement.lack.param)


def fits(memory: StageMemory, device: Device) -> bool:
    """Whether a device and its machine have what a stage takes."""
    return memory.device_bytes <= device.memory_bytes and memory.host_bytes <= device.host_bytes


def _lacking(
    spec: JobSpec, shape: ModelShape, device: Device, stages: Mapping[StageName, StageMemory]
) -> Iterator[Lack]:
    for stage, memory in stages.items():
        if memory.device_bytes > device.memory_bytes:
            yield Lack(device, stage, "a device's memory", memory.device_bytes, device.memory_bytes)
        elif memory.host_bytes > device.host_bytes:
            yield Lack(device, stage, "memory", memory.host_bytes, device.host_bytes)
    if (needed := disk_bytes(spec, shape)) > device.disk_bytes:
        yield Lack(device, None, "scratch disk", needed, max(1, device.disk_bytes))
