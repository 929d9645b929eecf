"""What prefill sends to decode for one request: the keys and values of which prompt tokens, and as which bytes.

The bytes are one safetensors file, whose metadata hold what is not a tensor; on a socket, its length comes first.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from workers.pruning.model.pair import FirstToken

Ranges = tuple[tuple[int, int], ...]
"""Token positions [start, stop) in ascending order."""
METADATA = "pdtrim_handover"
FORMAT_VERSION = 2
LENGTH_BYTES = 8
READ_BYTES = 1 << 20


class BrokenHandover(ValueError):
    """What arrived is no whole handover, or contradicts itself."""


@dataclass(frozen=True)
class KvTokenRule:
    """Which decode layers receive only the first and last of the tokens handed over; the others receive all of them.

    Raises: ValueError when it leaves a layer nothing.
    """

    first: int = 0
    last: int = 0
    layers: frozenset[int] = frozenset()
    """Layers of the decode checkpoint."""

    def __post_init__(self) -> None:
        if self.first < 0 or self.last < 0 or (self.layers and self.first + self.last == 0):
            raise ValueError(f"the first {self.first} and last {self.last} prompt tokens are no tokens to send")

    def ranges(self, layer: int, handed_tokens: int, held: int) -> Ranges:
        """The positions sent for a layer; of the tokens to hand over prefill holds the last `held`, by its window."""
        oldest = handed_tokens - held
        if layer not in self.layers or self.first + self.last >= handed_tokens:
            edges: Ranges = ((0, handed_tokens),)
        else:
            edges = ((0, self.first), (handed_tokens - self.last, handed_tokens))
        return tuple((max(start, oldest), stop) for start, stop in edges if max(start, oldest) < stop)

    def to_json(self) -> dict[str, Any]:
        """The entry `kv_tokens` of a `pdtrim.json`."""
        return {"first": self.first, "last": self.last, "layers": sorted(self.layers)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> KvTokenRule:
        """The inverse of `to_json`."""
        return cls(int(content["first"]), int(content["last"]), frozenset(map(int, content["layers"])))


EVERY_TOKEN = KvTokenRule()


@dataclass(frozen=True)
class LayerKV:
    """The keys and values that one decode layer receives, each (batch, kv heads, tokens, its head dimension)."""

    source: int
    """The prefill layer that computed them."""
    ranges: Ranges
    keys: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True)
class Handover:
    """Everything decode needs to go on. Sequences of one batch have prompts of one length.

    Raises: BrokenHandover naming the layer that contradicts itself.
    """

    handed_tokens: int
    """Prompt tokens that it is of: all, or all but the last where decode says the first token."""
    next_tokens: tuple[int, ...]
    """For each sequence, the token that decode runs first: the one that prefill said, or the prompt's last."""
    first_token: FirstToken
    layers: tuple[LayerKV, ...]

    def __post_init__(self) -> None:
        for number, layer in enumerate(self.layers):
            bounds = [position for part in layer.ranges for position in part]
            gaps = [after - before for before, after in pairwise([0, *bounds, self.handed_tokens])]
            # Every second gap is a range, which must hold a token; the others lie between ranges and may be empty.
            if min(gaps) < 0 or 0 in gaps[1::2]:
                raise BrokenHandover(
                    f"layer {number}: the token ranges {layer.ranges} do not fit {self.handed_tokens} prompt tokens"
                )
            tokens = sum(gaps[1::2])
            shape = tuple(layer.keys.shape)
            if len(shape) != 4 or shape[0] != len(self.next_tokens) or shape[2] != tokens:
                raise BrokenHandover(
                    f"layer {number}: keys of shape {shape} do not hold {tokens} tokens of {len(self.next_tokens)} "
                    "sequences"
                )
            # Where attention is latent, values are of another size than keys.
            if layer.values.shape[:-1] != layer.keys.shape[:-1] or layer.values.dtype != layer.keys.dtype:
                raise BrokenHandover(
                    f"layer {number}: keys are {shape} of {layer.keys.dtype}, values {tuple(layer.values.shape)} of "
                    f"{layer.values.dtype}"
                )

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(layer.nbytes for layer in self.layers)

    def to_bytes(self) -> bytes:
        """The handover as a safetensors file; its tensor data take exactly `nbytes`."""
        tensors: dict[str, Tensor] = {}
        for number, layer in enumerate(self.layers):
            tensors[f"{number}.keys"] = layer.keys.detach().cpu().contiguous()
            tensors[f"{number}.values"] = layer.values.detach().cpu().contiguous()
        content = {
            "format_version": FORMAT_VERSION,
            "handed_tokens": self.handed_tokens,
            "next_tokens": self.next_tokens,
            "first_token": self.first_token,
            "layers": [{"source": layer.source, "ranges": layer.ranges} for layer in self.layers],
        }
        return save(tensors, {METADATA: json.dumps(content)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Handover:
        """The inverse of `to_bytes`, on the CPU. Raises: BrokenHandover saying what is wrong."""
        try:
            tensors = load(data)
        except SafetensorError as error:
            raise BrokenHandover(f"{len(data)} bytes are no whole safetensors file: {error}") from error
        try:
            header = json.loads(data[LENGTH_BYTES : LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")])
            content = json.loads(header["__metadata__"][METADATA])
            version = content["format_version"]
            if version != FORMAT_VERSION:
                raise BrokenHandover(f"the handover has format version {version}; this is for {FORMAT_VERSION}")
            layers = tuple(
                LayerKV(
                    int(layer["source"]),
                    tuple((int(start), int(stop)) for start, stop in layer["ranges"]),
                    tensors[f"{number}.keys"],
                    tensors[f"{number}.values"],
                )
                for number, layer in enumerate(content["layers"])
            )
            next_tokens = tuple(map(int, content["next_tokens"]))
            handed_tokens, first_token = int(content["handed_tokens"]), content["first_token"]
        except BrokenHandover:
            raise
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise BrokenHandover(f"the safetensors file describes no handover: {error!r}") from error
        if len(tensors) != 2 * len(layers):
            raise BrokenHandover(f"{len(tensors)} tensors came for {len(layers)} layers; each has keys and values")
        if first_token not in get_args(FirstToken):
            raise BrokenHandover(f"the first token is said by decode or prefill, not by {first_token!r}")
        return cls(handed_tokens, next_tokens, first_token, layers)


def send(connection: socket.socket, frame: bytes) -> None:
    """Write a frame's length (8 bytes, big-endian) and the frame."""
    connection.sendall(len(frame).to_bytes(LENGTH_BYTES, "big"))
    connection.sendall(frame)


def receive(connection: socket.socket, *, max_bytes: int) -> bytes:
    """Read one frame that `send` wrote, waiting as long as the socket's timeout allows.

    Raises: BrokenHandover when it is announced as longer than `max_bytes`, or the peer closes before its end.
    """
    length = int.from_bytes(_read(connection, LENGTH_BYTES, "the length of a frame"), "big")
    if length > max_bytes:
        raise BrokenHandover(f"the peer announces a frame of {length} bytes; at most {max_bytes} are accepted")
    return _read(connection, length, "a frame")


def _read(connection: socket.socket, length: int, what: str) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = connection.recv(min(length - len(data), READ_BYTES))
        if not part:
            raise BrokenHandover(f"the connection closed after {len(data)} of {length} bytes of {what}")
        data += part
    return bytes(data)
