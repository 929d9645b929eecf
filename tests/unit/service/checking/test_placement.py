"""Where a job goes by what is known of workers, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from pdtrim.contract.devices import Device
from pdtrim.contract.errors import TooLittleMemory
from pdtrim.contract.jobs import StageName
from pdtrim.contract.spec import JobSpec
from service.checking.placement import check_room, placed
from tests.unit.service.checking.test_estimate import EIGHT_BILLION

QUEUES = ["default", "large"]


def gpus(queue: str, gigabytes: int, count: int = 1, host: int = 500) -> Device:
    return Device(
        queue=queue,
        kind="cuda",
        name=f"a GPU of {gigabytes} GB",
        count=count,
        memory_bytes=gigabytes * 10**9,
        host_bytes=host * 10**9,
        disk_bytes=10**12,
        flops=2e14,
        bfloat16_flops=4e14,
        bytes_per_second=2e12,
        call_seconds=5e-6,
    )


def spec(**changes: Any) -> JobSpec:
    asked: dict[str, Any] = {
        "model": "hf://a/b",
        "prefill": {"remove_blocks": 4},
        "decode": {"remove_blocks": 6},
        "calibration": {"windows": 16, "window_tokens": 1024},
    }
    return JobSpec.model_validate(asked | changes)


def test_a_job_goes_to_the_first_queue_whose_workers_have_room() -> None:
    small, large = gpus("default", 24), gpus("large", 80)
    assert placed(spec(), EIGHT_BILLION, [small, large], QUEUES).queue == "large"
    assert placed(spec(), EIGHT_BILLION, [gpus("default", 80), large], QUEUES).queue == "default"
    assert placed(spec(distillation={"enabled": False}), EIGHT_BILLION, [small, large], QUEUES).queue == "default"


def test_a_queue_of_unknown_workers_is_taken_as_it_comes() -> None:
    found = placed(spec(), EIGHT_BILLION, [gpus("large", 24)], QUEUES)
    assert (found.queue, found.device, found.lack) == ("default", None, None)


def test_what_no_worker_has_room_for_is_refused_with_the_number() -> None:
    found = placed(spec(), EIGHT_BILLION, [gpus("default", 24), gpus("large", 40)], QUEUES)
    assert found.lack is not None
    with pytest.raises(TooLittleMemory, match=r"distillation stage would take 5\d\.\d GB .* queue large have 40\.0 GB"):
        check_room(found)


def test_a_queue_that_the_job_names_is_not_left() -> None:
    found = placed(spec(queue="default"), EIGHT_BILLION, [gpus("default", 24), gpus("large", 80)], QUEUES)
    with pytest.raises(TooLittleMemory, match=r"queue default have 24\.0 GB") as refused:
        check_room(found)
    assert refused.value.param == "distillation.trainable"


def test_any_worker_of_a_queue_may_take_a_stage_so_the_least_counts() -> None:
    found = placed(spec(), EIGHT_BILLION, [gpus("default", 80), gpus("default", 24)], ["default"])
    assert found.device is not None
    assert found.device.memory_bytes == 24 * 10**9


def test_a_search_fits_where_the_model_does_not() -> None:
    stages = placed(spec(), EIGHT_BILLION, [gpus("default", 16)], ["default"]).stages
    assert stages[StageName.REMOVAL].way == "block by block"
    assert stages[StageName.REMOVAL].device_bytes < 8e9
    several = placed(spec(), EIGHT_BILLION, [gpus("default", 16, count=4)], ["default"]).stages
    assert several[StageName.REMOVAL].way == "sharded over 4 devices"


def test_files_that_do_not_fit_the_scratch_disk_are_refused() -> None:
    device = gpus("default", 80).model_copy(update={"disk_bytes": 50 * 10**9})
    with pytest.raises(TooLittleMemory, match=r"files would take 1[0-9]{2}.. GB of scratch disk"):
        check_room(placed(spec(), EIGHT_BILLION, [device], ["default"]))
