from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.unit.workers.pruning.models import framed_tokenizer, reference_tokenizer
from workers.pruning.model import calibration
from workers.pruning.model.calibration import (
    Frame,
    cut_windows,
    interleaved,
    said_again,
    split_stream,
    stdlib_documents,
    stdlib_files,
    token_stream,
)


def test_the_standard_librarys_splits_are_disjoint_and_stable() -> None:
    splits = {split: set(stdlib_documents(split)) for split in ("train", "calibration", "validation")}
    assert all(splits.values())
    assert not splits["train"] & splits["validation"] - {""}
    assert list(stdlib_documents("validation")) == list(stdlib_documents("validation"))


def test_documents_are_separated_by_the_end_of_text_token() -> None:
    tokenizer = reference_tokenizer()
    ids = token_stream(["a = 1", "b = 2"], tokenizer)
    assert tokenizer.decode(ids) == "a = 1<|endoftext|>b = 2<|endoftext|>"


def test_reading_stops_when_there_are_enough_tokens() -> None:
    read = []

    def documents() -> Iterator[str]:
        for text in ("x " * 50, "y " * 50, "z " * 50):
            read.append(text[0])
            yield text

    assert len(token_stream(documents(), reference_tokenizer(), at_least=60)) >= 60
    assert read == ["x", "y"]


def test_a_prompt_is_said_again_for_as_long_as_there_is_room() -> None:
    windows = torch.arange(14).view(2, 7)
    assert said_again(windows, 3).tolist() == [[0, 1, 2, 0, 1, 2, 0], [7, 8, 9, 7, 8, 9, 7]]


def test_what_a_text_begins_with_is_not_said_again() -> None:
    windows = torch.arange(14).view(2, 7)
    assert said_again(windows, 4, opening=1).tolist() == [[0, 1, 2, 3, 1, 2, 3], [7, 8, 9, 10, 8, 9, 10]]
    assert said_again(windows, 3, opening=2).tolist() == [[0, 1, 2, 2, 2, 2, 2], [7, 8, 9, 9, 9, 9, 9]]


@pytest.mark.parametrize(("opening", "closing"), [((), ()), ((7,), ()), ((7, 9), ()), ((), (0,)), ((7,), (0,))])
def test_what_stands_around_a_text_is_read_off_the_tokenizer(
    opening: tuple[int, ...], closing: tuple[int, ...]
) -> None:
    assert Frame.of(framed_tokenizer(opening, closing)) == Frame(opening, closing)


@pytest.mark.parametrize(
    ("copying", "order"),
    [
        (0, [0, 1, 2, 3, 4]),
        (1, [0, 1, 2, 3, 4, -1]),
        (2, [0, 1, 2, -1, 3, 4, -2]),
        (5, [0, -1, 1, -2, 2, -3, 3, -4, 4, -5]),
    ],
)
def test_windows_of_both_kinds_are_mixed_evenly_and_none_is_lost(copying: int, order: list[int]) -> None:
    mixed, is_copying = interleaved(torch.arange(5).view(5, 1), -1 - torch.arange(copying).view(copying, 1))
    assert mixed.flatten().tolist() == order
    assert is_copying == [window < 0 for window in order]


def test_windows_do_not_overlap_and_follow_from_the_seed() -> None:
    stream = torch.arange(103)
    windows = cut_windows(stream, count=5, tokens=10, seed=4)
    assert windows.shape == (5, 10)
    assert len(set(windows.flatten().tolist())) == 50
    assert torch.equal(windows, cut_windows(stream, count=5, tokens=10, seed=4))
    assert not torch.equal(windows, cut_windows(stream, count=5, tokens=10, seed=5))


def test_every_window_begins_as_a_text_does_and_is_no_longer_for_it() -> None:
    windows = cut_windows(torch.arange(100, 125), count=9, tokens=10, seed=0, opening=(7, 9))
    assert windows[:, :2].tolist() == [[7, 9]] * 3
    assert windows[:, 2:].flatten().tolist() == list(range(100, 124))


def test_a_short_stream_gives_the_windows_it_has() -> None:
    assert cut_windows(torch.arange(25), count=9, tokens=10, seed=0).shape == (2, 10)


def test_a_stream_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="the text has 9 tokens, less than one window of 10"):
        cut_windows(torch.arange(9), count=1, tokens=10, seed=0)


def test_a_stream_is_split_into_parts_that_each_hold_a_window() -> None:
    parts = split_stream(torch.arange(100), tokens=20)
    assert [len(parts[split]) for split in ("train", "calibration", "validation")] == [60, 20, 20]
    assert torch.equal(torch.cat([parts["train"], parts["calibration"], parts["validation"]]), torch.arange(100))
    with pytest.raises(ValueError, match="the text has 59 tokens"):
        split_stream(torch.arange(59), tokens=20)


def test_a_long_document_is_tokenized_in_pieces_that_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    document = "".join(f"def f_{n}(x):\n\n    return x + {n}\n\n\n" for n in range(200))
    whole = token_stream([document], reference_tokenizer())
    monkeypatch.setattr(calibration, "PART_CHARACTERS", 100)
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1

    found = token_stream([document], reference_tokenizer(), check=check)
    parts = list(calibration.parts(document))
    assert "".join(parts) == document
    assert asked == len(parts) > 30
    assert torch.equal(found, whole)


@pytest.mark.parametrize("document", ["", "x" * 500, "a\n" + " b\n" * 200])
def test_a_document_without_a_place_to_cut_stays_whole(document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "PART_CHARACTERS", 100)
    assert list(calibration.parts(document)) == [document]


def test_packages_beside_the_standard_library_are_no_text_and_are_walked_through_once() -> None:
    files = [path for paths in stdlib_files().values() for path in paths]
    assert "argparse.py" in {path.name for path in files}
    assert not any({"site-packages", "test", "tests"} & set(path.parts) for path in files)
    assert stdlib_files() is stdlib_files()
