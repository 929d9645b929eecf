"""What an estimate says of memory and time, beside what a worker counts and how it would run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.whole_jobs import WholeJob
from pdtrim.contract.devices import Device
from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import DistillationResult
from pdtrim.contract.spec import JobSpec
from service.checking import memory
from service.checking.memory import PROCESS_BYTES, checkpoints_of, stage_memory
from service.checking.sets import searches
from service.checking.shape import ModelShape, shape_of
from service.checking.work import DISK_BYTES_A_SECOND, stage_work
from service.sources import describe_model
from tests.tiny_job import tiny_spec, write_tiny_model
from tests.unit.service.checking.test_estimate import EIGHT_BILLION
from workers.inputs import models
from workers.stages import export

PAIR: dict[str, Any] = {"model": "hf://a/b", "prefill": {"remove_blocks": 4}, "decode": {"remove_blocks": 6}}


def cpu(gigabytes: float) -> Device:
    memory = int(gigabytes * 10**9)
    return Device(
        queue="default",
        kind="cpu",
        name="a CPU",
        count=1,
        memory_bytes=memory,
        host_bytes=memory,
        disk_bytes=10**13,
        flops=2e11,
        bfloat16_flops=None,
        bytes_per_second=2e10,
        call_seconds=7e-7,
    )


def eight_billion() -> ModelShape:
    found = shape_of(EIGHT_BILLION)
    assert found is not None
    return found


@pytest.mark.training
@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_healing_takes_what_the_worker_counts_without_the_blocks_that_are_given_up(
    trainable: str, tmp_path: Path
) -> None:
    model = write_tiny_model(tmp_path / "model")
    healing = {"heal_tokens": 128, "batch_windows": 4, "trainable": trainable, "lora": {"rank": 2, "alpha": 4}}
    asked = {"prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}, "distillation": healing}
    spec = JobSpec.model_validate(tiny_spec(model, **asked))
    job = WholeJob(spec, model, [spec.data.text or ""], tmp_path / "job")
    job.run([StageName.SCORING, StageName.REMOVAL, StageName.DISTILLATION])
    found = job.results[StageName.DISTILLATION]
    assert isinstance(found, DistillationResult)
    counted = [half.how.needed_bytes for half in (found.prefill, found.decode) if half is not None and half.how]

    shape = shape_of(describe_model(spec.model.source))
    assert shape is not None
    told = stage_memory(spec, shape, checkpoints_of(spec, shape), cpu(16))[StageName.DISTILLATION]
    # Adapters leave norms as they are, which are not told from the rest of a block.
    assert told.device_bytes - PROCESS_BYTES == pytest.approx(max(counted), rel=0 if trainable == "all" else 1e-3)


def test_what_the_worker_holds_at_most_is_what_the_estimate_takes_it_for() -> None:
    shared = ("RESIDENT_SHARE", "RESIDENT_WALK_BYTES", "STREAMED_WALK_BYTES", "ANCHOR_BYTES", "PROMPT_BYTES")
    assert {name: getattr(memory, name) for name in shared} == {name: getattr(models, name) for name in shared}
    assert memory.FILES_IN_MEMORY == export.SHARDS_IN_MEMORY


def test_what_is_stored_as_it_is_computed_with_is_not_counted_twice() -> None:
    spec, halved = JobSpec.model_validate(PAIR), eight_billion()
    exact = replace(halved, item_bytes=4, file_bytes=2 * halved.file_bytes, largest_file=2 * halved.largest_file)
    one, other = (
        stage_memory(spec, shape, checkpoints_of(spec, shape), cpu(500))[StageName.EXPORT].device_bytes
        for shape in (exact, halved)
    )
    prefill = checkpoints_of(spec, exact)[0].numbers
    assert one == 8 * prefill + PROCESS_BYTES
    assert other == (8 + 2) * prefill + PROCESS_BYTES


def test_a_worker_of_little_memory_holds_small_files_of_a_checkpoint() -> None:
    spec, shape = JobSpec.model_validate(PAIR), eight_billion()
    told = stage_memory(spec, shape, checkpoints_of(spec, shape), cpu(12))[StageName.EXPORT]
    assert told.streamed
    assert told.device_bytes < 12e9 < shape.largest_file


def test_seconds_count_every_reading_of_blocks_that_come_from_disk() -> None:
    lora = {"trainable": "lora", "heal_tokens": 8 * 1024 * 10}
    spec, shape = (
        JobSpec.model_validate(PAIR | {"distillation": lora, "search": {"algorithm": "greedy"}}),
        eight_billion(),
    )
    made = checkpoints_of(spec, shape)
    work = stage_work(spec, shape, made, searches(spec, shape.blocks, shape))
    seconds = {}
    for device in (cpu(12), cpu(500)):
        stages = stage_memory(spec, shape, made, device)
        seconds[device.memory_bytes] = {stage: work[stage].on(device, stages[stage]) for stage in StageName}
        assert {one.streamed for one in stages.values()} == {device.memory_bytes < 10**11}
    little, much = seconds.values()
    once = shape.file_bytes / DISK_BYTES_A_SECOND
    for stage, times in {
        StageName.SCORING: 1,
        StageName.REMOVAL: 8,  # rounds of greedy, at least
        StageName.DISTILLATION: 2 * 10 * 2,  # steps of both halves: dense model, student, and back
        StageName.EXPORT: 2,
        StageName.EVALUATION: 2,
    }.items():
        assert little[stage] > much[stage] + times * once
