"""The held-out questions of the tables: what is asked, and how answers are counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Digits, Sequence, Whitespace
from transformers import PreTrainedTokenizerFast

import workers
from benchmarks.questions import (
    CHOICES,
    COPIED_TOKENS,
    DIGITS,
    NAMES,
    PASSAGE_TOKENS,
    Answers,
    Questions,
    answered,
    copied_spans,
    in_order,
    lookups,
    needles,
    next_passage,
    running_text,
)
from workers.pruning.model.checkpoint import load_checkpoint

REFERENCE = Path(workers.__file__).parent / "reference_model"
STREAM = torch.arange(4000)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a word, and one a digit."""
    words = [*"0123456789.:", "The", "secret", "number", "of", "is", "\n", "[UNK]", *NAMES]
    model = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    model.pre_tokenizer = Sequence([Whitespace(), Digits(individual_digits=True)])
    return PreTrainedTokenizerFast(tokenizer_object=model)


def test_the_same_continuations_follow_prompts_of_any_length() -> None:
    short, long = (running_text(STREAM, prompt, count=8, longest=300) for prompt in (20, 300))
    assert torch.equal(short.windows[:, 20:], long.windows[:, 300:])
    assert torch.equal(short.windows[:, :20], long.windows[:, 280:300])
    assert len(set(short.windows[:, 20:].flatten().tolist())) == 8 * 128


def test_continuations_that_would_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match="too few for 60 continuations"):
        running_text(STREAM, 20, count=60, longest=300)


def test_what_is_copied_stands_in_the_prompt() -> None:
    asked = copied_spans(STREAM, 256, count=5)
    for window in asked.windows:
        answer = window[asked.prompt_tokens :]
        assert len(answer) == COPIED_TOKENS
        assert any(torch.equal(window[at : at + COPIED_TOKENS], answer) for at in range(256 - COPIED_TOKENS))


@pytest.mark.parametrize("ask", [needles, lookups])
def test_the_number_that_is_asked_for_stands_once_in_the_prompt(ask, tokenizer: PreTrainedTokenizerFast) -> None:  # type: ignore[no-untyped-def]
    asked = ask(torch.full((4000,), 12), tokenizer, 400, count=6, seed=0)
    assert asked.windows.shape == (6, 400 + DIGITS)
    for window in asked.windows.tolist():
        prompt, answer = window[:400], window[400:]
        assert sum(prompt[at : at + DIGITS] == answer for at in range(400)) == 1


def test_a_tokenizer_that_joins_digits_is_refused() -> None:
    words = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    with pytest.raises(ValueError, match="digit by digit"):
        needles(STREAM, PreTrainedTokenizerFast(tokenizer_object=words), 400, count=1, seed=0)


def test_answers_are_those_of_the_whole_model() -> None:
    model = load_checkpoint(REFERENCE, dtype=torch.float32, device=torch.device("cpu"))
    asked = running_text(STREAM % 1000, 40, count=3, longest=40)
    found = answered(model, model, list(range(12)), asked, first_token="decode", batch=2)
    with torch.no_grad():
        logits = model(input_ids=asked.windows).logits[:, 39:-1].log_softmax(-1)
    losses = -logits.gather(-1, asked.windows[:, 40:, None])[..., 0].mean(dim=1)
    assert found.losses == pytest.approx(losses.tolist(), abs=1e-4)
    assert found.exact == [False] * 3


def test_the_first_passage_to_choose_goes_on_from_the_prompt_and_the_others_do_not() -> None:
    asked = next_passage(STREAM, 32, count=5, seed=0)
    assert asked.windows.shape == (5 * CHOICES, 32 + PASSAGE_TOKENS)
    goes_on = (asked.windows[:, 32] == asked.windows[:, 31] + 1).view(-1, CHOICES)
    assert goes_on.tolist() == [[True] + [False] * (CHOICES - 1)] * 5


def test_the_others_to_choose_from_have_two_tokens_exchanged() -> None:
    asked = in_order(STREAM, 32, count=5, seed=0)
    right = asked.windows[::CHOICES].repeat_interleave(CHOICES, dim=0)
    exchanged = (asked.windows != right).sum(dim=1).view(-1, CHOICES)
    assert exchanged.tolist() == [[0] + [2] * (CHOICES - 1)] * 5
    assert torch.equal(asked.windows.sort().values, right.sort().values)


def test_of_choices_the_likelier_is_taken() -> None:
    model = load_checkpoint(REFERENCE, dtype=torch.float32, device=torch.device("cpu"))
    one, other = torch.randint(100, 2000, (2, 1, 12), generator=torch.Generator().manual_seed(0))
    losses = [
        answered(model, model, range(12), Questions("one", window, 6), first_token="decode", batch=2).losses[0]
        for window in (one, other)
    ]
    both = Questions("both", torch.cat([one, other, other, one]), 6, choices=2)
    found = answered(model, model, range(12), both, first_token="decode", batch=3)
    assert found.losses == pytest.approx([losses[0], losses[1]], abs=1e-5)
    assert found.exact == [losses[0] < losses[1], losses[1] < losses[0]]


def test_losses_are_compared_question_by_question() -> None:
    more, error = Answers([3.0, 5.0, 4.0], [True] * 3).above(Answers([2.0, 4.0, 3.0], [True] * 3))
    assert (more, error) == (1.0, 0.0)
