"""Rows as token ids: which are answers, by chat templates of several kinds."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from service.sources import Conversation, Exchange, Row, Text, UnreadableSource
from tests.unit.workers.pruning.models import framed_tokenizer, reference_tokenizer
from workers.inputs.encoding import Encoder

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last or m.role == 'user' else '…' }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""As those that leave out what was thought before earlier answers."""
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('a user begins') }}{% endif %}" + PLAIN
UNLIKE = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


TALK = (turn("user", "a?"), turn("assistant", "b"), turn("user", "c?"), turn("assistant", "d"))


def encoder(template: str | None, opening: tuple[int, ...] = ()) -> Encoder:
    tokenizer: PreTrainedTokenizerBase = framed_tokenizer(opening)
    tokenizer.chat_template = template
    return Encoder(tokenizer, opening)


def split(encoder: Encoder, row: Row) -> tuple[str, str]:
    """What a row says, and what of it counts."""
    (found,) = encoder.encoded([row])
    counted = [token for token, counts in zip(found.ids, found.counted, strict=True) if counts]
    return str(encoder.tokenizer.decode(found.ids)), str(encoder.tokenizer.decode(counted))


@pytest.mark.parametrize(
    ("template", "row", "said", "counted"),
    [
        (None, Text("a\n", "w"), "a\nE", "a\nE"),
        (PLAIN, Text("a\n", "w"), "a\nE", "a\nE"),
        (PLAIN, Conversation(TALK, (1, 3), "w"), "<user>a?E\n<assistant>bE\n<user>c?E\n<assistant>dE\n", "bEdE"),
        (PLAIN, Conversation(TALK, (3,), "w"), "<user>a?E\n<assistant>bE\n<user>c?E\n<assistant>dE\n", "dE"),
        (FORGETFUL, Conversation(TALK, (1, 3), "w"), "<user>a?E\n<assistant>…E\n<user>c?E\n<assistant>dE\n", "dE"),
        (PLAIN, Exchange("a?", "b", "w"), "<user>a?E\n<assistant>bE\n", "bE"),
        (None, Exchange("a?", " b", "w"), "a? bE", " bE"),
    ],
)
def test_what_is_said_and_what_counts(template: str | None, row: Row, said: str, counted: str) -> None:
    end = "<|endoftext|>"
    assert split(encoder(template), row) == (said.replace("E", end), counted.replace("E", end))


def test_a_conversation_does_not_begin_with_what_begins_every_window() -> None:
    begin = reference_tokenizer()("#", add_special_tokens=False)["input_ids"]
    found = split(encoder("#" + PLAIN, tuple(begin)), Conversation(TALK[:2], (1,), "w"))
    assert found == ("<user>a?<|endoftext|>\n<assistant>b<|endoftext|>\n", "b<|endoftext|>")


@pytest.mark.parametrize(
    ("template", "row", "complaint"),
    [
        (None, Conversation(TALK, (1,), "line 3 of a"), "line 3 of a has messages, but the model has no chat template"),
        (STRICT, Conversation(TALK[1:], (0,), "line 3 of a"), "line 3 of a: .* does not take it: a user begins"),
        (UNLIKE, Conversation(TALK, (1, 3), "line 3 of a"), "line 3 of a: .* no answer as it was given"),
    ],
)
def test_a_row_of_which_nothing_can_count_is_named(template: str | None, row: Row, complaint: str) -> None:
    with pytest.raises(UnreadableSource, match=complaint):
        list(encoder(template).encoded([row]))


def test_a_text_in_pieces_ends_once() -> None:
    pieces = [Text("a\n", "w", ends=False), Text(" \n", "w", ends=False), Text("b", "w"), Text("", "w"), Text("c", "w")]
    found = [token for piece in encoder(None).encoded(pieces) for token in piece.ids]
    assert str(reference_tokenizer().decode(found)) == "a\n \nb<|endoftext|>c<|endoftext|>"


@pytest.mark.parametrize(
    ("template", "row", "prompt"),
    [
        (None, Exchange("a?", "b", "w"), "a?"),
        (PLAIN, Exchange("a?", None, "w"), "<user>a?E\n<assistant>"),
        (PLAIN, Conversation(TALK, (1, 3), "w"), "<user>a?E\n<assistant>bE\n<user>c?E\n<assistant>"),
        (PLAIN, Conversation(TALK[:3], (1,), "w"), "<user>a?E\n<assistant>bE\n<user>c?E\n<assistant>"),
    ],
)
def test_a_prompt_is_all_before_the_last_answer(
    template: str | None, row: Exchange | Conversation, prompt: str
) -> None:
    found = encoder(template)
    assert str(found.tokenizer.decode(found.prompt(row))) == prompt.replace("E", "<|endoftext|>")
