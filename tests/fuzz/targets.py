"""What is fuzzed: what reads bytes that a stranger wrote, each as a function that raises when it errs."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import safetensors
from pydantic import ValidationError

from pdtrim.contract.spec import JobSpec
from service.sources.safetensors_header import InvalidHeader, read_header


def safetensors_header(data: bytes) -> None:
    """A header is refused with InvalidHeader, or its file is one that the library reads with the same tensors."""
    try:
        found = read_header(io.BytesIO(data), len(data))
    except InvalidHeader as error:
        str(error).encode()
        return
    read = {name: (t["dtype"], tuple(t["shape"]), len(t["data"])) for name, t in safetensors.deserialize(data)}
    assert read == {name: (t.dtype, t.shape, t.end - t.begin) for name, t in found.items()}
    assert sum(t.end - t.begin for t in found.values()) + int.from_bytes(data[:8], "little") + 8 == len(data)


def job_spec(data: bytes) -> None:
    """A body is refused with ValidationError, or is a job that can be stored and comes back as it was."""
    try:
        spec = JobSpec.model_validate_json(data)
    except ValidationError as error:
        for one in error.errors(include_url=False):
            str(one["msg"]).encode("utf-8", "replace")
        return
    stored = json.dumps(spec.model_dump(mode="json"), allow_nan=False)
    stored.encode()
    assert "\\u0000" not in stored.replace("\\\\", "")
    assert JobSpec.model_validate(json.loads(stored)) == spec


TARGETS: dict[str, Callable[[bytes], None]] = {"safetensors_header": safetensors_header, "job_spec": job_spec}
