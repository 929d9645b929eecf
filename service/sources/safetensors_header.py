"""The header of a safetensors file, checked before any tensor is read.

The format (https://github.com/huggingface/safetensors#format): the header's length as 8 bytes, little-endian; the
header, a JSON object of tensors by name; the tensors' bytes, one after the other. The bytes belong to whoever sent the
model, and so does every number here: nothing is read or allocated on their word beyond what the file holds.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, BinaryIO, NoReturn

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The format's own bound."""
METADATA = "__metadata__"
MAX_NAME_LENGTH = 1024
MAX_RANK = 64
LARGEST = 2**63 - 1
"""The largest size or offset that readers in 64 bits can hold."""
FIELDS = {"dtype", "shape", "data_offsets"}
DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("F4",), 4),
        **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
        **dict.fromkeys(("BOOL", "I8", "U8"), 8),
        **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
        **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
        **dict.fromkeys(("I32", "U32", "F32"), 32),
        **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    }
)
"""Bits of one element, by the names of safetensors 0.8."""
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How files of `torch.save` begin: a zip archive, or a bare pickle of protocol 2 to 5."""


class InvalidHeader(ValueError):
    """Why a file's header cannot be believed; the message names the tensor, and leaves the file to the caller."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's type and shape, and its bytes: from `begin` up to, without, `end`, counted from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def header_bytes(file: BinaryIO, size: int) -> int:
    """Length of the header of a file of `size` bytes, read from its start. Raises: InvalidHeader."""
    start = file.read(LENGTH_BYTES)
    if len(start) < LENGTH_BYTES:
        raise InvalidHeader(f"it has {size} bytes, too few for a header")
    length = int.from_bytes(start, "little")
    # Only then, as a header's length may begin with the same bytes.
    if length > size - LENGTH_BYTES and start.startswith(PICKLE_STARTS):
        raise InvalidHeader("it is a pickle under another name, which can run code when it is loaded")
    if length > MAX_HEADER_BYTES:
        raise InvalidHeader(f"its header is said to have {length} bytes; the format allows {MAX_HEADER_BYTES}")
    if length > size - LENGTH_BYTES:
        raise InvalidHeader(f"its header is said to have {length} bytes, more than the file of {size}")
    return length


def read_header(file: BinaryIO, size: int) -> dict[str, TensorInfo]:
    """The tensors of a file of `size` bytes by name, in the order of their bytes; reads the header alone.

    Raises: InvalidHeader.
    """
    length = header_bytes(file, size)
    header = file.read(length)
    if len(header) < length:
        raise InvalidHeader(f"it ends inside its header, which is said to have {length} bytes")
    return parse_header(header, size - LENGTH_BYTES - length)


def parse_header(header: bytes, data_bytes: int) -> dict[str, TensorInfo]:
    """The tensors that a header describes, by name, in the order of their bytes, of which there are `data_bytes`.

    Raises: InvalidHeader.
    """
    content = _json_object(header)
    _check_metadata(content.pop(METADATA, {}))
    tensors = {name: _tensor(name, described, data_bytes) for name, described in content.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_cover(ordered, data_bytes)
    return ordered


def _json_object(header: bytes) -> dict[str, Any]:
    try:
        text = header.decode()
    except UnicodeDecodeError as error:
        raise InvalidHeader(f"its header is not UTF-8 at byte {error.start}") from error
    if not text.startswith("{"):
        raise InvalidHeader("its header does not begin with {")
    try:
        content: dict[str, Any] = json.loads(
            text,
            object_pairs_hook=_distinct,
            parse_int=_whole,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
    except RecursionError as error:
        raise InvalidHeader("its header is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise InvalidHeader(f"its header is not JSON: {error.msg} at character {error.pos}") from error
    return content


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise InvalidHeader(f"its header has {_shown(repeated)} twice")
    return found


def _whole(digits: str) -> int:
    # Python converts long numbers in quadratic time, and refuses them only past thousands of digits.
    if digits.startswith("-") or len(digits) > len(str(LARGEST)):
        _refuse_number(digits)
    return int(digits)


def _refuse_number(number: str) -> NoReturn:
    raise InvalidHeader(f"its header has the number {number[:40]}; shapes and offsets are whole, from 0 to {LARGEST}")


def _check_metadata(metadata: Any) -> None:
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if not texts:
        raise InvalidHeader(f"its {METADATA} does not map text to text")


def _tensor(name: str, described: Any, data_bytes: int) -> TensorInfo:
    shown = f"the tensor {_shown(name)}"
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise InvalidHeader(f"{shown} has a name that is empty, longer than {MAX_NAME_LENGTH} or not printable")
    if not isinstance(described, dict) or described.keys() != FIELDS:
        raise InvalidHeader(f"{shown} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise InvalidHeader(f"{shown} has the dtype {_shown(dtype)}, which is none of safetensors")
    if not _are_whole(shape) or len(shape) > MAX_RANK:
        raise InvalidHeader(f"{shown} has a shape that is no list of at most {MAX_RANK} whole numbers")
    if not _are_whole(offsets) or len(offsets) != 2:
        raise InvalidHeader(f"{shown} has data_offsets that are not two whole numbers")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise InvalidHeader(f"{shown} is said to lie at bytes {begin} to {end} of {data_bytes}")
    needed = _bytes_of(shown, dtype, shape)
    if end - begin != needed:
        raise InvalidHeader(f"{shown} has {end - begin} bytes, but {dtype} of shape {_shown(shape)} takes {needed}")
    return TensorInfo(dtype, tuple(shape), begin, end)


def _are_whole(values: Any) -> bool:
    # True is an int to Python, but not in JSON.
    return isinstance(values, list) and all(type(value) is int for value in values)


def _bytes_of(shown: str, dtype: str, shape: list[int]) -> int:
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
        # Also where a later 0 would make it small again: readers multiply in this order.
        if bits > LARGEST:
            raise InvalidHeader(f"{shown} has more elements than can be counted: {dtype} of shape {_shown(shape)}")
    if bits % 8:
        raise InvalidHeader(f"{shown} ends inside a byte: {dtype} of shape {_shown(shape)}")
    return bits // 8


def _check_cover(tensors: Mapping[str, TensorInfo], data_bytes: int) -> None:
    """Hold tensors in the order of their bytes against the format: no byte belongs to two, and none to no tensor."""
    position, before = 0, ""
    for name, tensor in tensors.items():
        if tensor.begin < position:
            raise InvalidHeader(f"the tensors {_shown(before)} and {_shown(name)} overlap at byte {tensor.begin}")
        if tensor.begin > position:
            raise InvalidHeader(f"bytes {position} to {tensor.begin}, before {_shown(name)}, belong to no tensor")
        position, before = tensor.end, name
    if position < data_bytes:
        raise InvalidHeader(f"its last {data_bytes - position} bytes belong to no tensor")


def _shown(value: Any) -> str:
    """A value from the file as an error may repeat it: escaped, and short."""
    text = repr(value[:MAX_NAME_LENGTH] if isinstance(value, str | list) else value)
    return text if len(text) <= 80 else f"{text[:80]}…"
