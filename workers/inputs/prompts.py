"""Prompts for the dense model to answer: of the rows of a job's data, those that are cut into no windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from service.sources import Row, Text
from service.stopping import Check
from workers.inputs.encoding import Encoder

EVERY = 4
"""Of so many rows one is for windows, as long as those need any."""
LEAST_ANSWER = 16
"""Tokens that an answer is counted as before it is known: there are prompts enough even if all answers are short."""
PART_WINDOWS = 4
"""A longer text is as several rows, so that windows and prompts come of it both."""
CHARACTERS_A_TOKEN = 4
IDS, LENGTHS = "ids", "lengths"


@dataclass
class Prompts:
    """Gathers prompts until the dense model's answers to them will have `wanted_tokens`, prompts included.

    A prompt has at most half of a window, so that an answer has room behind it; longer ones are left out. Of a text,
    every run of that length is one, and the answer goes on from it.
    """

    encoder: Encoder
    window_tokens: int
    wanted_tokens: int
    found: list[list[int]] = field(default_factory=list)
    left_out: int = 0
    _tokens: int = 0

    @property
    def longest(self) -> int:
        return self.window_tokens // 2 - len(self.encoder.opening)

    @property
    def enough(self) -> bool:
        return self._tokens >= self.wanted_tokens

    def beside(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Every so many rows; the others become prompts. Raises: UnreadableSource."""
        for number, row in enumerate(rows):
            if self.enough or number % EVERY == 0:
                yield row
            else:
                self.take(row)

    def take(self, row: Row) -> None:
        """Make a row a prompt, or several. Raises: UnreadableSource."""
        if isinstance(row, Text):
            for ids in _runs(self.encoder.ids(row.text), self.longest):
                self._add(ids)
        else:
            self._add(self.encoder.prompt(row))

    def rest(self, rows: Iterator[Row], check: Check) -> None:
        """Take what is missing from further rows."""
        while not self.enough and (row := next(rows, None)) is not None:
            check()
            self.take(row)

    def _add(self, ids: list[int]) -> None:
        if len(ids) > self.longest:
            self.left_out += 1
        elif ids and not self.enough:
            self.found.append(ids)
            self._tokens += len(ids) + LEAST_ANSWER


def _runs(ids: list[int], longest: int) -> Iterator[list[int]]:
    length = min(longest, len(ids) // 2)
    for start in range(0, len(ids) - length + 1, max(1, length)):
        yield ids[start : start + length]


def in_parts(rows: Iterable[Row], window_tokens: int) -> Iterator[Row]:
    """The same rows, but long texts in parts of a few windows, which end where a line does, if there is one."""
    most = PART_WINDOWS * CHARACTERS_A_TOKEN * window_tokens
    for row in rows:
        if not isinstance(row, Text):
            yield row
            continue
        text = row.text
        while len(text) > most:
            border = text.rfind("\n", 1, most) + 1 or most
            yield Text(text[:border], row.where, ends=False)
            text = text[border:]
        yield Text(text, row.where, row.ends)


def packed(prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Lists of token ids as two tensors: all ids in a row, and how many belong to each."""
    return {
        IDS: torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.long),
        LENGTHS: torch.tensor([len(prompt) for prompt in prompts], dtype=torch.long),
    }


def unpacked(tensors: Mapping[str, Tensor]) -> list[list[int]]:
    """The reverse."""
    return [part.tolist() for part in tensors[IDS].split(tensors[LENGTHS].tolist())] if len(tensors[LENGTHS]) else []
