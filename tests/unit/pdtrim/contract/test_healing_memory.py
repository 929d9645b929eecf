from __future__ import annotations

from dataclasses import replace

import pytest

from pdtrim.contract.healing_memory import (
    LOSS_LOGITS,
    STEP_NUMBERS,
    USABLE,
    HealingSize,
    HealingWay,
    Precision,
    healing_devices,
    healing_way,
    keeps_targets,
    needed_bytes,
    sharded_size,
)
from pdtrim.contract.spec import DistillationSpec
from tests.unit.workers.pruning.models import tiny_model
from workers.pruning.model.blocks import block_stack
from workers.pruning.repair import losses, optimiser
from workers.stages.healing_size import block_width

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
ASKED = HealingWay("float32", recomputed=False, parts=1)
BLOCK = 218_112_000  # of Llama-3.1-8B
WIDTH = 8192 + 5120 + 5120 + 8192 + 3 * 18432
EIGHT_BILLION = HealingSize(
    beside=2 * 8_030_261_248,
    trained=28 * BLOCK,
    adapters=False,
    own=0,
    frozen=8_030_261_248 - 28 * BLOCK,
    blocks=28,
    block_width=WIDTH,
    hidden=4096,
    vocabulary=128_256,
    windows=8,
    window_tokens=1024,
    number_bytes=2,
    on_host=False,
)
SMALL = replace(
    EIGHT_BILLION, beside=4 * 1000, trained=800, frozen=200, block_width=60, hidden=8, vocabulary=97, blocks=4
)


def test_all_weights_of_eight_billion_are_healed_on_one_device_of_80_gigabytes() -> None:
    alone = healing_way(EIGHT_BILLION, ASKED, 80 * 10**9)
    assert (alone.precision, alone.recomputed, alone.parts) == ("bfloat16", True, 1)
    # Beside a prefill half whose other weights are the dense model's: 32 blocks, 8 of them for keys and values alone.
    beside_prefill = replace(EIGHT_BILLION, beside=EIGHT_BILLION.beside + 2 * (24 * BLOCK + 8 * 25_165_824))
    way = healing_way(beside_prefill, ASKED, 80 * 10**9)
    assert way.precision == "bfloat16"
    assert needed_bytes(beside_prefill, way) <= USABLE * 80 * 10**9
    # Float32 would not have fitted two of them.
    assert needed_bytes(EIGHT_BILLION, replace(ASKED, recomputed=True, parts=8)) > 120 * 10**9


def test_what_fits_is_healed_as_asked() -> None:
    for asked in (ASKED, HealingWay("float32", recomputed=True, parts=2)):
        assert healing_way(SMALL, asked, 10**9) == asked


def test_ways_that_cost_more_time_or_exactness_come_later_as_memory_shrinks() -> None:
    taken = []
    for free in range(300 * 10**9, 0, -(10**9) // 2):
        way = healing_way(EIGHT_BILLION, ASKED, free)
        if way not in taken:
            taken.append(way)
    needs = [needed_bytes(EIGHT_BILLION, way) for way in taken]
    assert [way.precision for way in taken] == sorted((way.precision for way in taken), reverse=True)
    assert taken[0] == ASKED
    assert taken[-1] == HealingWay("bfloat16", recomputed=True, parts=8)
    assert needs == sorted(needs, reverse=True)


def test_frozen_weights_cost_nothing_where_the_dense_model_has_them_in_the_same_precision() -> None:
    more = 10**9
    for number_bytes, free in ((2, "bfloat16"), (4, "float32")):
        size = replace(SMALL, number_bytes=number_bytes, on_host=True)
        for precision in PRECISIONS:
            way = HealingWay(precision, recomputed=True, parts=1)
            added = needed_bytes(replace(size, frozen=size.frozen + more), way) - needed_bytes(size, way)
            assert (added == 0) == (precision == free)


def test_adapters_take_a_fraction_of_what_all_weights_take() -> None:
    adapters = replace(EIGHT_BILLION, trained=40_000_000, adapters=True, own=28 * BLOCK)
    for precision in PRECISIONS:
        way = HealingWay(precision, recomputed=True, parts=1)
        beside = (needed_bytes(size, way) - size.beside for size in (adapters, EIGHT_BILLION))
        assert 1.5 * next(beside) < next(beside)


@pytest.mark.parametrize(("family", "width"), [("llama", 2 * 64 + 2 * 48 + 3 * 80), ("qwen3-moe", None)])
def test_the_width_of_a_block_is_what_its_matrices_take_and_give(family: str, width: int | None) -> None:
    block = block_stack(tiny_model(family)).blocks[1]
    if width is not None:
        assert block_width(block, None) == width
    else:
        assert block_width(block, 1) < block_width(block, 2) < block_width(block, None)


def test_what_is_held_at_a_time_is_what_the_method_holds() -> None:
    assert (LOSS_LOGITS, STEP_NUMBERS) == (losses.LOSS_LOGITS, optimiser.STEP_NUMBERS)


def test_targets_are_kept_where_the_dense_model_has_no_room_beside_the_student() -> None:
    without = replace(EIGHT_BILLION, beside=0, shares=False)
    kept = [keeps_targets(EIGHT_BILLION, without, ASKED, gigabytes * 10**9) for gigabytes in (20, 60, 80, 140, 160)]
    # At 20 nothing fits, and at 140 the dense model's 16 are what float32 lacks.
    assert kept == [True, True, False, True, False]


def test_without_the_dense_model_a_student_holds_its_frozen_weights_itself() -> None:
    way = HealingWay("bfloat16", recomputed=True, parts=1)
    without = replace(EIGHT_BILLION, beside=0, shares=False)
    saved = needed_bytes(EIGHT_BILLION, way) - needed_bytes(without, way)
    assert saved == EIGHT_BILLION.beside - 2 * EIGHT_BILLION.frozen


@pytest.mark.parametrize(
    ("asked", "gpus", "windows", "devices"),
    [(None, 0, 8, 1), (3, 0, 8, 3), (None, 4, 8, 4), (2, 4, 8, 2), (8, 4, 8, 4), (None, 8, 2, 2), (1, 8, 8, 1)],
)
def test_healing_takes_the_devices_that_there_are_and_that_have_something_to_do(
    asked: int | None, gpus: int, windows: int, devices: int
) -> None:
    assert healing_devices(DistillationSpec(devices=asked, batch_windows=windows), gpus) == devices


@pytest.mark.parametrize("way", [HealingWay("float32", False, 1), HealingWay("bfloat16", True, 1)])
def test_several_devices_share_out_all_but_what_is_in_no_block_and_the_blocks_at_work(way: HealingWay) -> None:
    numbers, outside, block = 10_000, 1_000, 900
    size = HealingSize(
        beside=2 * numbers,
        trained=9_000,
        adapters=False,
        own=0,
        frozen=1_000,
        blocks=10,
        block_width=0,
        hidden=0,
        vocabulary=0,
        windows=8,
        window_tokens=0,
        number_bytes=2,
        on_host=False,
    )
    shared = sharded_size(size, 3, outside=outside, block=block)
    stepping = needed_bytes(replace(size, beside=0, frozen=0), way)
    frozen = (4 + 2) * outside if way.precision == "float32" else 0
    gathered = block * (2 * 2 + 4)
    assert needed_bytes(shared, way) == 2 * 9_000 / 3 + 2 * outside + gathered + stepping / 3 + frozen
    assert shared.windows == 3


def test_on_a_cpu_what_adapters_adapt_is_kept_as_it_was_and_is_held_again_at_the_end() -> None:
    adapters = replace(SMALL, adapters=True, trained=80, own=500, stored_bytes=2)
    on_host = replace(adapters, on_host=True)
    # Copies of the adapters: the best, those being saved, and their moments; what they adapt, in 16 bits.
    assert needed_bytes(on_host, ASKED) - needed_bytes(adapters, ASKED) == (4 + 4 + 8) * 80 + 2 * 500
    # Where that is more than what passes through, it is held twice in place of it.
    larger = replace(on_host, own=10**9, hidden=1, vocabulary=1, block_width=1)
    twice = replace(larger, own=2 * 10**9)
    assert needed_bytes(twice, ASKED) - needed_bytes(larger, ASKED) == (4 + 2 + 2 + 2) * 10**9
