"""The windows of a whole job: how much is read, what of it counts, and how each window begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pdtrim.contract.errors import InvalidRequest
from pdtrim.contract.spec import JobSpec
from service.sources import Conversation, Exchange, Row, Text
from tests.tiny_job import tiny_spec
from tests.unit.workers.pruning.models import framed_tokenizer, reference_tokenizer
from workers.inputs.windows import token_windows
from workers.pruning.model.calibration import token_stream

DOCUMENTS = ["".join(f"a_{i} = {i}\n" for i in range(start, start + 300)) for start in (0, 1000, 5000)]
BEGIN, END = 5, 6
"""Characters that none of the documents has."""


def texts(documents: list[str]) -> list[Row]:
    return [Text(document, f"row {number}") for number, document in enumerate(documents)]


def spec(**calibration: Any) -> JobSpec:
    found = tiny_spec(Path("/nowhere"), calibration={"windows": 9, "window_tokens": 32, **calibration})
    return JobSpec.model_validate({**found, "distillation": {"heal_tokens": 8192}})


def test_windows_of_every_use_begin_as_the_tokenizer_begins_a_text() -> None:
    tokenizer = framed_tokenizer((BEGIN,), (END,))
    found = token_windows(spec(), texts(DOCUMENTS), tokenizer).ids
    stream = token_stream(DOCUMENTS, reference_tokenizer())
    assert BEGIN not in stream
    text = " ".join(map(str, stream.tolist()))
    for windows in found.values():
        assert windows.shape[1] == 32
        assert (windows[:, 0] == BEGIN).all()
        for window in windows[:, 1:].tolist():
            assert " ".join(map(str, window)) in text


@pytest.mark.parametrize("documents", [DOCUMENTS, None], ids=["given", "the standard library"])
def test_what_a_tokenizer_puts_behind_a_text_is_in_no_window(documents: list[str] | None) -> None:
    tokenizers = (reference_tokenizer(), framed_tokenizer((), (END,)))
    plain, closed = (
        token_windows(spec(), None if documents is None else texts(documents), tokenizer).ids
        for tokenizer in tokenizers
    )
    assert all(torch.equal(closed[split], windows) for split, windows in plain.items())


def test_windows_that_hold_little_but_special_tokens_are_refused() -> None:
    with pytest.raises(
        InvalidRequest, match="begins every text with 4 special tokens, which leaves no prompt"
    ) as error:
        token_windows(spec(window_tokens=8), texts(DOCUMENTS), framed_tokenizer((1, 2, 3, BEGIN)))
    assert error.value.param == "calibration.window_tokens"


def test_no_more_is_read_than_the_windows_need() -> None:
    read = 0

    def endless() -> Iterator[Row]:
        nonlocal read
        while True:
            read += 1
            yield Text("a_1 = 1\n" * 10, f"row {read}")

    found = token_windows(spec(), endless(), reference_tokenizer()).ids

    assert {split: len(windows) for split, windows in found.items()} == {
        "train": 257, "calibration": 9, "validation": 4,
    }  # fmt: skip
    row = len(token_stream(["a_1 = 1\n" * 10], reference_tokenizer()))
    assert read == -(-270 * 32 // row)


def test_windows_of_no_use_overlap_and_each_use_has_some_of_every_part_of_the_text() -> None:
    document = "".join(f"{number}\n" for number in range(20_000))
    found = token_windows(spec(), texts([document]), reference_tokenizer())
    assert found.answers == {}
    stream = token_stream([document], reference_tokenizer())[: 270 * 32].view(270, 32).tolist()
    places = {split: [stream.index(window) for window in part.tolist()] for split, part in found.ids.items()}
    assert sorted(place for of_use in places.values() for place in of_use) == list(range(270))
    for of_use in places.values():
        # The first few too: what is held out, said again or folded on.
        assert min(of_use[:6]) < 270 / 3 < 270 * 2 / 3 < max(of_use[:6])


def test_of_too_little_text_each_use_gets_its_share() -> None:
    document = "".join(f"{number}\n" for number in range(20_000))
    tokens = token_stream([document], reference_tokenizer()).tolist()

    def counts(windows: int) -> list[int]:
        text = str(reference_tokenizer().decode(tokens[: windows * 32 + 8]))
        found = token_windows(spec(), texts([text]), reference_tokenizer()).ids
        return [len(found[split]) for split in ("train", "calibration", "validation")]

    assert counts(100) == [87, 9, 4]
    assert counts(50) == [41, 5, 4]
    assert counts(12) == [4, 4, 4]
    with pytest.raises(InvalidRequest, match=r"11 windows of 32; 12 are the least: 4 for training, 4 for calibration"):
        counts(11)


def test_rows_without_text_leave_no_token() -> None:
    blank = ["", " \n", "\t"]
    between = [piece for document in DOCUMENTS for piece in (*blank, document, *blank)]
    plain, blanked = (token_windows(spec(), texts(rows), reference_tokenizer()).ids for rows in (DOCUMENTS, between))
    assert all(torch.equal(blanked[split], windows) for split, windows in plain.items())
    with pytest.raises(InvalidRequest, match="the data has 0 tokens"):
        token_windows(spec(), texts(blank * 99), reference_tokenizer())


def test_only_answers_count_in_the_windows_of_conversations() -> None:
    tokenizer = framed_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "answer"})
    rows: list[Row] = [Conversation(turns * 2, (1, 3), f"row {number}") for number in range(400)]

    found = token_windows(spec(), rows, tokenizer)

    assert set(found.tensors) == {
        "train", "calibration", "validation", "answers.train", "answers.calibration", "answers.validation",
    }  # fmt: skip
    for split, windows in found.ids.items():
        assert found.answers[split].shape == windows.shape
        for window, counted in zip(windows, found.answers[split], strict=True):
            said = str(tokenizer.decode(window[counted]))
            assert said.strip("answer").startswith("<|endoftext|>")
            assert not set(said) & set("?<u") - set("<|endoftext|>")
            assert "?" in str(tokenizer.decode(window[~counted]))


def test_completions_count_without_a_chat_template() -> None:
    tokenizer = reference_tokenizer()
    rows: list[Row] = [Exchange("def f(x):\n", "    return x\n", f"row {number}") for number in range(900)]

    found = token_windows(spec(), rows, tokenizer)

    windows = [str(tokenizer.decode(window)) for window in found.ids["train"]]
    (first,) = [
        n for n, text in enumerate(windows) if text.startswith("def f(x):\n    return x\n<|endoftext|>def f(x):")
    ][:1]
    counted = str(tokenizer.decode(found.ids["train"][first][found.answers["train"][first]]))
    assert counted.startswith("    return x\n<|endoftext|>  ")
