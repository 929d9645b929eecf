from __future__ import annotations

import errno

import pytest
from safetensors import SafetensorError
from sqlalchemy.exc import DataError, OperationalError

from service.storage import StoreRefused, StoreUnavailable
from workers.inputs.faults import may_pass, patient


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (StoreUnavailable("away"), True),
        (StoreRefused("no such bucket"), False),
        (OperationalError("SELECT 1", {}, Exception("the server closed the connection")), True),
        (DataError("INSERT", {}, Exception("out of range")), False),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (ValueError("too few windows"), False),
    ],
)
def test_only_faults_of_servers_and_full_disks_may_pass(error: Exception, passes: bool) -> None:
    assert may_pass(error) is passes


class Flaky:
    """Fails so many times."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times, self.calls = error, times, 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return self.calls


def test_a_store_that_is_away_for_a_moment_costs_a_moment() -> None:
    assert patient(10.0)(Flaky(StoreUnavailable("away"), 2)) == 3


def test_the_last_fault_is_raised_when_the_time_is_over() -> None:
    with pytest.raises(StoreUnavailable):
        patient(0.5)(Flaky(StoreUnavailable("away"), 1000))


@pytest.mark.parametrize("error", [StoreRefused("closed"), OSError(errno.ENOSPC, "full"), ValueError("wrong")])
def test_what_does_not_pass_by_waiting_is_not_waited_for(error: Exception) -> None:
    call = Flaky(error, 1)
    with pytest.raises(type(error)):
        patient(10.0)(call)
    assert call.calls == 1


def test_waiting_ends_when_the_stage_is_to_stop() -> None:
    class Stopped(Exception):
        pass

    def check() -> None:
        raise Stopped

    call = Flaky(StoreUnavailable("away"), 1000)
    with pytest.raises(Stopped):
        patient(60.0, check)(call)
    assert call.calls == 1
