from __future__ import annotations

import pytest

from pdtrim.display.quantities import counted, duration, listed, size


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1 << 20, "1 MiB"),
        (3 << 30, "3 GiB"),
        (2e15, "1,862,645 GiB"),
    ],
)
def test_a_size_has_the_largest_unit_that_fits(number: float, shown: str) -> None:
    assert size(number) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.04, "0.0 s"), (59.9, "59.9 s"), (61, "1 min 01 s"), (7260, "2 h 01 min")]
)
def test_a_time_span_has_two_units_at_most(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_one_block_is_not_blocks_and_nothing_is_named() -> None:
    assert (counted(1), counted(2), listed([]), listed([1, 2])) == ("1 block", "2 blocks", "none", "1, 2")
