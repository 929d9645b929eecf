"""What workers compute on, as each says when it starts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pdtrim.contract.jobs import AnswerModel


class Device(AnswerModel):
    """The devices of one kind of worker, and how fast one of them was in a probe of a second."""

    queue: str = Field(description="From which the worker takes stages.", examples=["default"])
    kind: Literal["cpu", "cuda"]
    name: str = Field(description="As the driver or the processor says it.", examples=["NVIDIA H100 80GB HBM3"])
    count: int = Field(ge=1, description="Devices that the worker sees.")
    memory_bytes: int = Field(description="Of one device; on a CPU, the machine's.")
    host_bytes: int = Field(description="Memory of the machine.")
    disk_bytes: int = Field(description="Free in the worker's scratch folder when it started.")
    flops: float = Field(description="Operations a second of one large matrix product in float32.")
    bfloat16_flops: float | None = Field(description="In bfloat16; null where the device does not multiply it itself.")
    bytes_per_second: float = Field(description="Read and written when a large tensor is scaled.")
    call_seconds: float = Field(description="From one small operation to the next.")
