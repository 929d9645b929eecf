"""Whether what decode has read was still prefill's."""

from __future__ import annotations

from pdtrim_vllm.lease import MARGIN_SECONDS, Leases


def test_a_lease_holds_to_its_end_and_not_beyond() -> None:
    assert Leases(20).held("a", end=30, now=29)
    assert not Leases(20).held("a", end=30, now=30)
    assert not Leases(20).held("a", end=30, now=30 - MARGIN_SECONDS)


def test_heartbeats_extend_a_lease_from_when_they_were_sent() -> None:
    leases = Leases(20)
    for sent in (5, 25, 40):
        leases.beat("a", sent)

    assert leases.held("a", end=30, now=59)


def test_a_heartbeat_after_the_end_brings_nothing_back() -> None:
    leases = Leases(20)
    leases.beat("a", 31)

    assert not leases.held("a", end=30, now=32)


def test_a_heartbeat_does_not_shorten_a_lease() -> None:
    leases = Leases(20)
    leases.beat("a", 1)

    assert leases.held("a", end=30, now=29)


def test_what_was_asked_for_and_what_is_long_past_is_forgotten() -> None:
    leases = Leases(20)
    leases.beat("a", 1)
    leases.beat("b", 2)
    leases.beat("c", 50)
    leases.held("a", end=30, now=5)
    leases.forget(before=10)

    assert list(leases.heartbeats) == ["c"]
