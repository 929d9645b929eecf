"""What the numbers of a model's configuration may be: sizes are whole and above zero, and its tensors, whose bytes
somebody had to send, bound them.

A configuration is a text of a few bytes, and libraries loop over its numbers and build from them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pdtrim.contract.architectures import BLOCK_COUNT_KEYS, CONTEXT_KEYS, EXPERT_KEYS
from pdtrim.contract.spec import MAX_BLOCKS
from service.sources.errors import UnreadableSource
from service.sources.safetensors_header import TensorInfo

SIZES = frozenset(
    {
        *("vocab_size", "hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "num_labels"),
        *("intermediate_size", "n_inner", "ffn_dim"),
        *("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"),
        *EXPERT_KEYS,
    }
)
"""What is a dimension of some tensor, or less."""
MAY_BE_NONE_OF = frozenset({*EXPERT_KEYS, "num_labels", "n_inner"})
"""Of these there may be zero."""
COUNTS = SIZES | {*BLOCK_COUNT_KEYS, *CONTEXT_KEYS}
FREE = re.compile("theta|base|freq")
"""Numbers that are written without a point, but are no sizes: bases of rotary embeddings."""
LARGEST_FREE = 10**15
LARGEST_CONTEXT = 2**24
"""No tensor has the length of a context whose positions are rotated."""
CONTEXTS = re.compile("|".join(("position", "context", "window", "length", "seq", "n_ctx", *CONTEXT_KEYS)))
LARGEST_OTHER = 2**20
"""Of all other numbers, such as token ids that no token has, nothing grows with them."""
NUMBERED = re.compile(r"^(?P<prefix>(?:.*?\.)?)(?P<number>\d{1,9})\.")
ELEMENTS_A_BYTE = 2
"""Of the smallest type, F4."""


@dataclass(frozen=True)
class TensorBounds:
    """What is known of a model's tensors: how many blocks they are of, and that no dimension is larger."""

    blocks: int
    largest: int

    @classmethod
    def in_headers(cls, tensors: Mapping[str, TensorInfo]) -> TensorBounds:
        """By the headers of all weight files."""
        largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
        return cls(_blocks(tensors), largest)

    @classmethod
    def in_index(cls, names: Iterable[str], weight_bytes: int) -> TensorBounds:
        """By the names that an index lists, and the bytes of all weight files; no names are as if there was none."""
        return cls(_blocks(names) or MAX_BLOCKS, ELEMENTS_A_BYTE * weight_bytes)


def _blocks(names: Iterable[str]) -> int:
    """The most numbers that follow one beginning: `model.layers.0.…`, `model.layers.1.…` are two blocks."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for name in names:
        if (match := NUMBERED.match(name)) is not None:
            numbers[match["prefix"]].add(int(match["number"]))
    return max(map(len, numbers.values()), default=0)


def check_numbers(config: Mapping[str, Any], held: TensorBounds, what: str) -> None:
    """Hold every number of the configuration `what` against the model's tensors. Raises: UnreadableSource."""
    for key, value in _values(config):
        if key in COUNTS:
            _check_count(key, value, what)
    _check_heads(config, what)
    for key, value in _numbers(config):
        if key in BLOCK_COUNT_KEYS:
            if value > held.blocks:
                raise UnreadableSource(
                    f"{what} has {key} = {_shown(value)}, but there are tensors of {held.blocks} blocks."
                )
        elif value > (most := _most(key, held)):
            raise UnreadableSource(
                f"{what} has {key} = {_shown(value)}; beside tensors like the model's it may be {most} at most."
            )


def _most(key: str, held: TensorBounds) -> int:
    if key in SIZES:
        return held.largest
    if FREE.search(key):
        return LARGEST_FREE
    return max(held.largest, LARGEST_CONTEXT if CONTEXTS.search(key) else LARGEST_OTHER)


def _check_count(key: str, value: Any, what: str) -> None:
    """Raises: UnreadableSource for what is no number, or too small a one; null leaves it to the architecture."""
    least = 0 if key in MAY_BE_NONE_OF else 1
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < least):
        raise UnreadableSource(f"{what} has {key} = {_shown(value)}, which is no number of {least} or more.")


def _check_heads(config: Mapping[str, Any], what: str) -> None:
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if type(heads) is int and type(shared) is int and heads % shared:
        raise UnreadableSource(
            f"{what} has num_key_value_heads = {shared}, which does not divide num_attention_heads = {heads}."
        )


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Every number with its key. Where nothing is built from it, a number with a point is a factor, and is left out."""
    for key, value in _values(config):
        if type(value) is int or (type(value) is float and (key in SIZES or key in BLOCK_COUNT_KEYS)):
            yield key, value


def _values(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every value with the key that it, or the list that it is in, stands under; in whatever depth."""
    rest: list[tuple[str, Any]] = list(config.items())
    while rest:
        key, value = rest.pop()
        if isinstance(value, dict):
            rest += value.items()
        elif isinstance(value, list):
            rest += [(key, item) for item in value]
        else:
            yield key, value


def _shown(value: object) -> str:
    return text if len(text := repr(value)) <= 40 else f"{text[:40]}…"
