"""Text to fixed, reproducible token windows."""

from __future__ import annotations

import hashlib
import os
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Split = Literal["train", "calibration", "validation"]
SECTIONS = 8
"""Windows for each use come from so many places of a text, so that none of them is of one place alone."""
PART_CHARACTERS = 1 << 20
LINE_START = re.compile(r"(?<=\n)(?=\S)")
EXCLUDED_PARTS = {"site-packages", "test", "tests", "lib2to3", "__pycache__"}
PROBE = "A text."


class TooLittleText(ValueError):
    """A text has fewer tokens than the windows that are to be cut of it."""


@dataclass(frozen=True)
class Frame:
    """The special tokens, by number, that a tokenizer puts before a text and behind it: `<bos>`, or nothing."""

    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Frame:
        """Read off a text that is tokenized with them and without."""
        bare, whole = (tokenizer(PROBE, add_special_tokens=special)["input_ids"] for special in (False, True))
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return cls(tuple(whole[:start]), tuple(whole[start + len(bare) :]))
        return cls()


def stdlib_documents(split: Split) -> Iterator[str]:
    """The source files of the running Python's standard library, split by the SHA-1 of their relative path.

    0–7 % are validation, 7–14 % calibration, the rest training: the split that the reference model was trained with.
    """
    for path in stdlib_files()[split]:
        yield path.read_text(errors="replace")


@cache
def stdlib_files() -> Mapping[Split, Sequence[Path]]:
    """The paths of those, ascending.

    Listed once: beside the library lie as many packages as were installed, which take seconds to walk through.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[Split, list[Path]] = {"train": [], "calibration": [], "validation": []}
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in EXCLUDED_PARTS]
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            bucket = int(hashlib.sha1(path.relative_to(root).as_posix().encode()).hexdigest(), 16) % 100
            found["validation" if bucket < 7 else "calibration" if bucket < 14 else "train"].append(path)
    return {split: sorted(paths) for split, paths in found.items()}


def token_stream(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    at_least: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Token ids of the documents, (tokens,), an end-of-text token after each; stops once there are `at_least`.

    Before each document, and within long ones, `check` is called, which may raise.
    """
    ids: list[int] = []
    for document in documents:
        for part in parts(document):
            check()
            ids += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if at_least is not None and len(ids) >= at_least:
            break
    return torch.tensor(ids, dtype=torch.long)


def parts(document: str) -> Iterator[str]:
    """A long document in parts that are tokenized by themselves: a gigabyte at once takes many times its memory.

    Where a line begins without white space, which tokenizers hardly ever join to the line before.
    """
    start = 0
    while len(document) - start > PART_CHARACTERS:
        border = LINE_START.search(document, start + PART_CHARACTERS)
        if border is None:
            break
        yield document[start : border.start()]
        start = border.start()
    yield document[start:]


def cut_windows(stream: Tensor, *, count: int, tokens: int, seed: int, opening: Sequence[int] = ()) -> Tensor:
    """`count` windows that do not overlap, (windows, tokens), in the stream's order; the seed chooses which.

    Each begins with the tokens of `opening`, which are among its `tokens`. Fewer windows when the stream holds fewer.
    Raises: TooLittleText when it does not hold one.
    """
    taken = tokens - len(opening)
    available = len(stream) // taken
    if available == 0:
        raise TooLittleText(f"the text has {len(stream)} tokens, less than one window of {tokens}")
    chosen = sorted(random.Random(seed).sample(range(available), min(count, available)))
    windows = stream[: available * taken].view(available, taken)[chosen]
    return torch.cat([torch.tensor(opening, dtype=stream.dtype).expand(len(windows), -1), windows], dim=1)


def mixed(windows: Tensor, seed: int) -> Tensor:
    """The same windows (windows, tokens) in another order: the first few of them are then of all parts of the text.

    What is held out, said again, or folded on is the first few.
    """
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]


def said_again(windows: Tensor, prompt_tokens: int, *, opening: int = 0) -> Tensor:
    """Windows (windows, tokens) whose first `prompt_tokens` are followed by themselves, as often as there is room.

    The first `opening` of them are said at the start alone. Whether a model predicts the rest shows whether it finds
    again what stands in its prompt.
    """
    positions = torch.arange(windows.shape[1])
    return windows[:, positions.where(positions < opening, opening + (positions - opening) % (prompt_tokens - opening))]


def interleaved(text: Tensor, copying: Tensor) -> tuple[Tensor, list[bool]]:
    """Both kinds of windows in one (windows, tokens), evenly mixed so that the first few are like all of them.

    Also whether each is of `copying`, of which there are no more than of `text`.
    """
    windows: list[Tensor] = []
    is_copying: list[bool] = []
    taken = 0
    for number, window in enumerate(text, start=1):
        windows.append(window)
        is_copying.append(False)
        if taken < number * len(copying) // len(text):
            windows.append(copying[taken])
            is_copying.append(True)
            taken += 1
    return torch.stack(windows), is_copying


def split_stream(stream: Tensor, *, tokens: int) -> dict[Split, Tensor]:
    """A stream without a split of its own: the last tenth for validation, the tenth before for calibration.

    Each part holds at least one window of `tokens`. Raises: TooLittleText when the stream is shorter than three.
    """
    if len(stream) < 3 * tokens:
        raise TooLittleText(
            f"the text has {len(stream)} tokens; training, calibration and validation need a window of {tokens} each"
        )
    tenth = max(len(stream) // 10, tokens)
    train = len(stream) - 2 * tenth
    return {
        "train": stream[:train],
        "calibration": stream[train : train + tenth],
        "validation": stream[train + tenth :],
    }


def deal(available: int, wanted: Mapping[Split, int], least: Mapping[Split, int]) -> dict[Split, list[int]]:
    """Which of the `available` windows of a text are for what, by number, ascending and none for two.

    All that are `wanted` where there are so many. Else calibration and validation get a tenth each, but no fewer than
    `least`, training the rest. Windows of one use lie together, in each of up to `SECTIONS` parts of the text.
    """
    counts = _shares(available, wanted, least)
    sections = max(1, min(SECTIONS, counts["calibration"], counts["validation"]))
    places: dict[Split, list[int]] = {"train": [], "calibration": [], "validation": []}
    start = 0
    for section in range(sections):
        for split, numbers in places.items():
            count = (section + 1) * counts[split] // sections - section * counts[split] // sections
            numbers.extend(range(start, start + count))
            start += count
    return places


def _shares(available: int, wanted: Mapping[Split, int], least: Mapping[Split, int]) -> dict[Split, int]:
    if sum(wanted.values()) <= available:
        return dict(wanted)
    measured: tuple[Split, Split] = ("calibration", "validation")
    counts = {split: min(wanted[split], max(available // 10, least[split])) for split in measured}
    counts["train"] = min(wanted["train"], available - sum(counts.values()))
    for split in measured:
        counts[split] = min(wanted[split], counts[split] + available - sum(counts.values()))
    return counts
