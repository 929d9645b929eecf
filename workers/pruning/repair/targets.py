"""The dense model's targets, computed once ahead of training and kept in files: healing without that model at hand.

Kept of a window are the hidden states that the loss compares, in 8 bits a number with a scale a token, and the last
one, after the final norm, in 16: the student's head, which healing never changes, makes the dense model's whole
distribution of it. Beside the other states that is little, and unlike the most probable words it leaves no word out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from workers.pruning.repair.losses import Outputs, outputs

GROUP_BYTES = 64 * 2**20
"""Of targets in a file, at most, unless one window has more."""
SMALL = torch.float8_e4m3fn
LARGEST = torch.finfo(SMALL).max
SCALE_BYTES = 4
LAST = "last"


def token_bytes(blocks: Sequence[int], hidden: int) -> int:
    """What is kept of a token where the states that enter `blocks` are, of a model of that hidden size."""
    return len(blocks) * (hidden + SCALE_BYTES) + 2 * hidden


def group_windows(blocks: Sequence[int], hidden: int, window_tokens: int) -> int:
    """Windows of a file."""
    return max(1, GROUP_BYTES // (token_bytes(blocks, hidden) * window_tokens))


@torch.no_grad()
def computed(model: PreTrainedModel, windows: Tensor, blocks: Sequence[int], batch: int) -> dict[str, Tensor]:
    """The targets of windows (windows, tokens), `batch` at a time, on the host, as `Targets` reads them."""
    parts = [_packed(outputs(model, ids, blocks), blocks) for ids in windows.split(batch)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _packed(made: Outputs, blocks: Sequence[int]) -> dict[str, Tensor]:
    *states, last = made.hidden
    kept = {LAST: last.bfloat16().cpu()}
    for block, state in zip(blocks, states, strict=True):
        exact = state.float()
        scale = exact.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
        kept |= {f"scale.{block}": scale.cpu(), f"state.{block}": (exact / scale.unsqueeze(-1)).to(SMALL).cpu()}
    return kept


class Targets:
    """The kept targets of some windows, found by what their tokens are. To be closed."""

    def __init__(self, windows: Tensor, files: Sequence[Path]) -> None:
        """Of `windows` (windows, tokens), the first so many in the first of the files, as `computed` made them."""
        self._windows = windows.cpu()
        self._opened = ExitStack()
        opened = [self._opened.enter_context(safe_open(path, "pt")) for path in files]
        self._places = [(file, number) for file in opened for number in range(file.get_slice(LAST).get_shape()[0])]
        self._numbers: dict[int, dict[bytes, int]] = {}
        """Windows by what they begin with, by how much of it."""

    def close(self) -> None:
        """Let go of the files."""
        self._opened.close()

    def of(self, ids: Tensor, blocks: Sequence[int], by: Outputs, *, start: int, dtype: torch.dtype) -> Outputs:
        """What the dense model made of `ids` (batch, time), which are windows or begin some, from the token `start` on.

        The head is that of `by`, which takes `dtype`.
        Raises: KeyError for other tokens; SafetensorError for blocks of which no states are kept.
        """
        part = slice(start, ids.shape[1])
        read = [_read(*self._places[number], blocks, part) for number in self._found(ids)]
        return replace(by, hidden=[torch.stack(states).to(ids.device, dtype) for states in zip(*read, strict=True)])

    def _found(self, ids: Tensor) -> Iterator[int]:
        time = ids.shape[1]
        if time not in self._numbers:
            self._numbers[time] = {row.numpy().tobytes(): number for number, row in enumerate(self._windows[:, :time])}
        for row in ids.cpu():
            yield self._numbers[time][row.numpy().tobytes()]


def _read(file: Any, number: int, blocks: Sequence[int], part: slice) -> Iterator[Tensor]:
    for block in blocks:
        scale = file.get_slice(f"scale.{block}")[number, part]
        yield file.get_slice(f"state.{block}")[number, part].float() * scale.unsqueeze(-1)
    yield file.get_slice(LAST)[number, part]
