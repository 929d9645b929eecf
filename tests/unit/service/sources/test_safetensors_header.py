from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
from typing import Any

import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.sources.safetensors_header import (
    DTYPE_BITS,
    LARGEST,
    MAX_HEADER_BYTES,
    InvalidHeader,
    TensorInfo,
    read_header,
)


def of(tensors: Any, data: bytes = b"") -> bytes:
    """A file with a header as given, text or what is to be JSON, and `data`."""
    header = tensors if isinstance(tensors, str) else json.dumps(tensors)
    return struct.pack("<Q", len(header.encode())) + header.encode() + data


def tensor(dtype: Any = "U8", shape: Any = (4,), begin: Any = 0, end: Any = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read(file: bytes) -> dict[str, TensorInfo]:
    return read_header(io.BytesIO(file), len(file))


def test_tensors_come_in_the_order_of_their_bytes() -> None:
    file = of(
        {
            "__metadata__": {"format": "pt"},
            "late": tensor("BF16", [2, 1], 4, 8),
            "early": tensor("F32", [], 0, 4),
            "empty": tensor("F64", [0, 7], 8, 8),
            "packed": tensor("F4", [3, 2], 8, 11),
        },
        bytes(11),
    )

    assert list(read(file).items()) == [
        ("early", TensorInfo("F32", (), 0, 4)),
        ("late", TensorInfo("BF16", (2, 1), 4, 8)),
        ("empty", TensorInfo("F64", (0, 7), 8, 8)),
        ("packed", TensorInfo("F4", (3, 2), 8, 11)),
    ]


def test_a_header_may_be_padded_with_blanks_and_describe_nothing() -> None:
    assert read(of('{"__metadata__": {}}     ')) == {}


@pytest.mark.parametrize(
    ("file", "complaint"),
    [
        (b"", "has 0 bytes, too few"),
        (b"1234567", "has 7 bytes, too few"),
        (struct.pack("<Q", 2**64 - 1), "the format allows 100000000"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1), "the format allows 100000000"),
        (struct.pack("<Q", 3) + b"{}", "3 bytes, more than the file of 10"),
        (b"PK\x03\x04\x00\x00\x08\x08\x00\x00", "pickle under another name"),
        (b"\x80\x02}q\x00X\x04\x00", "pickle under another name"),
        (struct.pack("<Q", 2) + b"{\xff", "not UTF-8 at byte 1"),
        (of("[]"), "does not begin with {"),
        (of(" {}"), "does not begin with {"),
        (of(""), "does not begin with {"),
        (of("{"), "not JSON"),
        (of("{} x"), "not JSON"),
        (of('{"a": 01}'), "not JSON"),
        (of('{"a":' * 100_000), "nested too deeply"),
    ],
)
def test_a_file_that_is_none_is_refused(file: bytes, complaint: str) -> None:
    with pytest.raises(InvalidHeader, match=complaint):
        read(file)


@pytest.mark.parametrize("length", [640, 896, 1152])
def test_a_length_that_begins_like_a_pickle_is_a_length(length: int) -> None:
    assert read(of("{}".ljust(length))) == {}


def test_a_file_that_shrank_is_refused() -> None:
    with pytest.raises(InvalidHeader, match="ends inside its header"):
        read_header(io.BytesIO(of("{}")[:9]), 10)


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ('{"a": {}, "a": {}}', "'a' twice"),
        ('{"a": {"dtype": "U8", "dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}', "'dtype' twice"),
        ({"__metadata__": {"a": 1}}, "__metadata__ does not map text to text"),
        ({"__metadata__": None}, "__metadata__ does not map text to text"),
        ({"a": None}, "'a' is not described by"),
        ({"a": {**tensor(), "more": 1}}, "'a' is not described by"),
        ({"a": {"dtype": "U8", "shape": [4]}}, "'a' is not described by"),
        ({"a": tensor("F12")}, "'a' has the dtype 'F12'"),
        ({"a": tensor(["U8"])}, r"'a' has the dtype \['U8'\]"),
        ({"a": tensor(shape=4)}, "'a' has a shape that is no list"),
        ({"a": tensor(shape=[True, 4])}, "'a' has a shape that is no list"),
        ({"a": tensor(shape=["4"])}, "'a' has a shape that is no list"),
        ({"a": tensor(shape=[1] * 65 + [4])}, "'a' has a shape that is no list of at most 64"),
        ({"a": tensor(shape=[-4])}, "the number -4"),
        ({"a": tensor(shape=[4.0])}, "the number 4.0"),
        ('{"a": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 4]}}', "the number NaN"),
        ({"a": tensor(shape=[10**19])}, "the number 10000000000000000000"),
        ('{"a": ' + "9" * 10_000 + "}", "the number 9{40};"),
        ({"a": tensor(shape=[2**32, 2**31])}, "'a' has more elements than can be counted"),
        ({"a": tensor(shape=[LARGEST, LARGEST, 0], end=0)}, "'a' has more elements than can be counted"),
        ({"a": tensor("F4", [3], 0, 2)}, "'a' ends inside a byte"),
        ({"a": {**tensor(), "data_offsets": [0]}}, "'a' has data_offsets that are not two"),
        ({"a": tensor(end="4")}, "'a' has data_offsets that are not two"),
        ({"a": tensor(begin=4, end=0)}, "'a' is said to lie at bytes 4 to 0 of 4"),
        ({"a": tensor(begin=1, end=5)}, "'a' is said to lie at bytes 1 to 5 of 4"),
        ({"a": tensor("U16")}, r"'a' has 4 bytes, but U16 of shape \[4\] takes 8"),
        ({"a": tensor(), "b": tensor(shape=[2], begin=2)}, "'a' and 'b' overlap at byte 2"),
        ({"a": tensor(), "b": tensor()}, "overlap at byte 0"),
        ({"a": tensor(shape=[2], begin=2)}, "bytes 0 to 2, before 'a', belong to no tensor"),
        ({"a": tensor(shape=[3], end=3)}, "last 1 bytes belong to no tensor"),
        ({"": tensor()}, "a name that is empty"),
        ({"a\u0007": tensor()}, r"'a\\x07' has a name"),
        ({"a\u202eb": tensor()}, r"'a\\u202eb' has a name"),
        ({"a\ud800": tensor()}, r"'a\\ud800' has a name"),
        ({"a" * 1025: tensor()}, "'aaaa.*… has a name"),
    ],
)
def test_a_header_that_lies_is_refused_with_the_tensor_named(header: Any, complaint: str) -> None:
    with pytest.raises(InvalidHeader, match=complaint):
        read(of(header, bytes(4)))


def test_the_dtypes_are_those_of_the_library() -> None:
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(of({"a": tensor("none")}, bytes(4)))
    known = str(caught.value).partition("expected one of ")[2].partition(" at line")[0]

    assert {name.strip("`") for name in known.split(", ")} == set(DTYPE_BITS)


SMALL = st.integers(0, 3)
SHAPES = st.lists(SMALL, max_size=3) | st.lists(st.sampled_from([0, 1, 2**31, 2**62, LARGEST, 2**64]), max_size=4)
DESCRIPTIONS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "F12"]),
        "shape": SHAPES,
        "data_offsets": st.lists(st.integers(0, 24), min_size=2, max_size=2),
    }
)


@st.composite
def packed_files(draw: st.DrawFn) -> bytes:
    """Files that are right, with tensors of any type side by side, or that one wrong offset makes wrong."""
    tensors, position = {}, 0
    for number, dtype in enumerate(draw(st.lists(st.sampled_from(list(DTYPE_BITS)), max_size=4))):
        shape = draw(st.lists(SMALL, max_size=3))
        bits = DTYPE_BITS[dtype]
        for size in shape:
            bits *= size
        end = position + bits // 8 + draw(st.sampled_from([0] * 15 + [1]))
        tensors[f"t{number}"] = tensor(dtype, shape, position, end)
        position = end
    names = draw(st.permutations(list(tensors)))
    return of({name: tensors[name] for name in names}, bytes(position))


@given(packed_files() | st.builds(of, st.dictionaries(st.text(max_size=3), DESCRIPTIONS, max_size=3), st.binary()))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@example(of({"a": tensor("F4", [2], 0, 1)}, b"1"))
def test_what_is_accepted_the_library_reads_alike_and_what_it_refuses_is_refused(file: bytes) -> None:
    try:
        theirs = {name: (t["dtype"], tuple(t["shape"]), len(t["data"])) for name, t in safetensors.deserialize(file)}
    except safetensors.SafetensorError:
        with pytest.raises(InvalidHeader):
            read(file)
        return
    if all(name and name.isprintable() for name in theirs):
        assert {name: (t.dtype, t.shape, t.end - t.begin) for name, t in read(file).items()} == theirs
    else:
        with pytest.raises(InvalidHeader, match="has a name"):
            read(file)


WORST = {
    "empty lists": b'{"a":[' + b"[]," * 1_000_000 + b"[]]}",
    "short texts": b'{"a":[' + b'"ab",' * 600_000 + b'"ab"]}',
    "objects": b'{"a":[' + b"{}," * 1_000_000 + b"{}]}",
    "keys": b"{" + b",".join(b'"%x":0' % number for number in range(300_000)) + b"}",
    "ones": b'{"a":[' + b"1," * 1_500_000 + b"1]}",
}


@pytest.mark.parametrize("kind", WORST)
def test_time_and_memory_grow_with_the_header_alone(kind: str) -> None:
    script = (
        "import resource, sys, time; from service.sources.safetensors_header import InvalidHeader, parse_header\n"
        "header = sys.stdin.buffer.read()\n"
        "before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()\n"
        "try: parse_header(header, 0)\n"
        "except InvalidHeader: pass\n"
        "else: raise SystemExit('accepted')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.process_time() - begun)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=WORST[kind], stdout=subprocess.PIPE, check=True, timeout=60
    )

    kib, seconds = map(float, done.stdout.split())
    assert kib * 1024 < 40 * len(WORST[kind])
    assert seconds < 10
