"""Which rows become prompts for the dense model, and which windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pdtrim.contract.errors import InvalidRequest
from pdtrim.contract.spec import JobSpec
from service.sources import Exchange, Row, Text
from tests.tiny_job import tiny_spec
from tests.unit.workers.pruning.models import framed_tokenizer, reference_tokenizer
from workers.inputs.prompts import packed, unpacked
from workers.inputs.windows import token_windows

BEGIN = 5


def spec(**distillation: Any) -> JobSpec:
    found = tiny_spec(Path("/nowhere"), calibration={"windows": 4, "window_tokens": 32})
    return JobSpec.model_validate({**found, "distillation": {"data": "self", "heal_tokens": 2048, **distillation}})


def asked(count: int) -> list[Row]:
    return [Exchange(f"def f_{number}(x):\n", None, f"row {number}") for number in range(count)]


def test_rows_are_for_windows_or_prompts_and_no_more_are_read_than_both_need() -> None:
    tokenizer = reference_tokenizer()
    rows = iter(asked(9999))
    found = token_windows(spec(), rows, tokenizer)

    said = [tokenizer.decode(prompt) for prompt in found.prompts]
    assert said[:4] == [f"def f_{number}(x):\n" for number in (1, 2, 3, 5)]
    windows = tokenizer.decode(found.ids["calibration"].flatten())
    assert not any(prompt in windows for prompt in said)
    tokens = sum(map(len, found.prompts))
    assert tokens + 16 * len(said) >= 2048 > tokens + 16 * len(said) - 40
    assert next(rows).where < "row 999"
    assert len(found.ids["train"]) == 1


@pytest.mark.parametrize("rows", [None, [Text("".join(f"a_{n} = {n}\n" for n in range(3000)), "the text")]])
def test_of_texts_runs_of_half_a_window_are_prompts(rows: list[Row] | None) -> None:
    found = token_windows(spec(), rows, framed_tokenizer((BEGIN,)))
    assert {len(prompt) for prompt in found.prompts} >= {15}
    assert max(map(len, found.prompts)) == 15
    assert len(found.prompts) > 60


def test_prompts_too_long_for_an_answer_behind_them_are_left_out() -> None:
    long: list[Row] = [Exchange("x = 1\n" * 40, None, f"row {number}") for number in range(99)]
    found = token_windows(
        spec(), [row for pair in zip(long, asked(99), strict=True) for row in pair], reference_tokenizer()
    )
    assert found.prompts
    assert max(map(len, found.prompts)) <= 16
    with pytest.raises(InvalidRequest, match=r"no prompt of at most 16 tokens.* prompts are longer"):
        token_windows(spec(), long, reference_tokenizer())


def test_without_own_answers_every_row_is_for_windows() -> None:
    rows: list[Row] = [Text("a = 1\n" * 9, f"row {number}") for number in range(999)]
    assert token_windows(spec(data="given"), rows, reference_tokenizer()).prompts == []


def test_packed_prompts_are_found_again() -> None:
    for prompts in ([[1, 2], [], [3]], []):
        assert unpacked(packed(prompts)) == prompts
