from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from service.api.ranges import ByteRange, Unsatisfiable, already_known, wanted

ETAG = '"abc"'


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("bytes=0-0", ByteRange(0, 1)),
        ("bytes=2-4", ByteRange(2, 5)),
        ("bytes=2-", ByteRange(2, 10)),
        ("bytes=-3", ByteRange(7, 10)),
        ("bytes=-300", ByteRange(0, 10)),
        ("bytes=9-999999", ByteRange(9, 10)),
        ("Bytes = 1 - 2", ByteRange(1, 3)),
    ],
)
def test_one_range_is_cut_to_the_file(asked: str, found: ByteRange) -> None:
    assert wanted(Headers({"range": asked}), size=10, etag=ETAG) == found


@pytest.mark.parametrize(
    "asked",
    [
        "",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=5-2",
        "bytes=a-b",
        "lines=1-2",
        "bytes=0-1,3-4",
        "bytes=" + "9" * 50 + "-",
    ],
)
def test_what_cannot_be_served_as_one_range_gets_the_whole_file(asked: str) -> None:
    assert wanted(Headers({"range": asked}), size=10, etag=ETAG) is None


@pytest.mark.parametrize(
    ("asked", "size"), [("bytes=10-", 10), ("bytes=99-100", 10), ("bytes=-0", 10), ("bytes=0-", 0)]
)
def test_a_range_without_a_byte_in_the_file_is_unsatisfiable(asked: str, size: int) -> None:
    with pytest.raises(Unsatisfiable):
        wanted(Headers({"range": asked}), size=size, etag=ETAG)


def test_a_range_of_another_version_gets_the_whole_file() -> None:
    assert wanted(Headers({"range": "bytes=0-1", "if-range": '"old"'}), size=10, etag=ETAG) is None
    assert wanted(Headers({"range": "bytes=0-1", "if-range": ETAG}), size=10, etag=ETAG) == ByteRange(0, 2)


@pytest.mark.parametrize(
    ("tags", "known"), [('"abc"', True), ('"x", W/"abc"', True), ("*", True), ('"x"', False), ("", False)]
)
def test_a_client_that_names_the_version_needs_no_content(tags: str, known: bool) -> None:
    assert already_known(Headers({"if-none-match": tags}), etag=ETAG) is known
