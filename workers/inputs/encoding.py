"""Rows of data as token ids, and which of them are answers, on which alone a loss falls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from service.sources import Conversation, Exchange, Row, Text, UnreadableSource
from service.stopping import Check, go_on

USER, ASSISTANT = "user", "assistant"


@dataclass(frozen=True)
class Encoded:
    """Token ids of a row, or of a part of it, and whether each counts."""

    ids: list[int]
    counted: list[bool]


@dataclass(frozen=True)
class Encoder:
    """A model's tokenizer and chat template. `opening` begins every window, so no row begins with it as well."""

    tokenizer: PreTrainedTokenizerBase
    opening: Sequence[int] = ()

    def encoded(self, rows: Iterable[Row], check: Check = go_on) -> Iterator[Encoded]:
        """Each row, an end-of-text token behind it. Rows without text leave nothing. Asks `check` before each.

        Raises: UnreadableSource for a row that the chat template does not take.
        """
        begun = False
        for row in rows:
            check()
            if isinstance(row, Text):
                ids = self.ids(row.text) if row.text.strip() or begun else []
                begun = begun or bool(ids)
                end = self._end(ids) if begun and row.ends else []
                begun = begun and not row.ends
                if ids or end:
                    yield _all_counted([*ids, *end])
            else:
                yield self.conversation(row)

    def conversation(self, row: Conversation | Exchange) -> Encoded:
        """Questions and answers, of which the answers count, with the token that ends them.

        A prompt and its completion are said by user and assistant where the model has a chat template, and else simply
        follow one another. Raises: UnreadableSource.
        """
        if isinstance(row, Exchange) and self.tokenizer.chat_template is None:
            parts = [(row.prompt, False), *([] if row.completion is None else [(row.completion, True)])]
        else:
            parts = self._said(_as_conversation(row))
        ids: list[int] = []
        counted: list[bool] = []
        for text, counts in parts:
            found = self.ids(text)
            ids += found
            counted += [counts] * len(found)
        begun = self._begun(ids)
        ids, counted = ids[begun:], counted[begun:]
        end = self._end(ids)
        return Encoded([*ids, *end], [*counted, *(bool(counted) and counted[-1] for _ in end)])

    def prompt(self, row: Conversation | Exchange) -> list[int]:
        """What the model is given to answer a row: all but an answer at its end. Raises: UnreadableSource."""
        if isinstance(row, Exchange) and self.tokenizer.chat_template is None:
            return self.ids(row.prompt)
        asked = _as_conversation(row)
        messages = len(asked.messages)
        ids = self.ids(self._rendered(asked, messages - (messages - 1 in asked.answers), add_generation_prompt=True))
        return ids[self._begun(ids) :]

    def _begun(self, ids: Sequence[int]) -> int:
        """How many of the first tokens are those that begin every window."""
        length = len(self.opening)
        return length if tuple(ids[:length]) == tuple(self.opening) else 0

    def _said(self, row: Conversation) -> list[tuple[str, bool]]:
        """The rendered conversation in parts, and whether each is an answer."""
        whole = self._rendered(row, len(row.messages))
        parts: list[tuple[str, bool]] = []
        at = 0
        for answer in row.answers:
            span = self._span(row, answer, whole)
            if span is not None and span[0] >= at:
                parts += [(whole[at : span[0]], False), (whole[span[0] : span[1]], True)]
                at = span[1]
        if row.answers and not any(counts and text for text, counts in parts):
            raise UnreadableSource(
                f"{row.where}: the model's chat template says no answer as it was given, so none can be told apart."
            )
        return [(text, counts) for text, counts in [*parts, (whole[at:], False)] if text]

    def _span(self, row: Conversation, answer: int, whole: str) -> tuple[int, int] | None:
        """Where an answer stands, with what ends it; None where the template says earlier answers in another way."""
        until = self._rendered(row, answer + 1)
        if not whole.startswith(until):
            return None
        for ask in (True, False):
            before = self._rendered(row, answer, add_generation_prompt=ask)
            if until.startswith(before):
                # White space behind the end of an answer is the template's: no model says it.
                return len(before), max(len(before), len(until.rstrip()))
        return None

    def _rendered(self, row: Conversation, messages: int, *, add_generation_prompt: bool = False) -> str:
        """The first messages as the chat template has them. Raises: UnreadableSource."""
        if self.tokenizer.chat_template is None:
            raise UnreadableSource(
                f"{row.where} has messages, but the model has no chat template. Give it with the template, or data "
                "with the fields `prompt` and `completion`, or `text`."
            )
        if not messages:
            return ""
        try:
            found: Any = self.tokenizer.apply_chat_template(
                [dict(message) for message in row.messages[:messages]],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise UnreadableSource(f"{row.where}: the model's chat template does not take it: {error}.") from error
        return str(found)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text alone."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _end(self, ids: Sequence[int]) -> list[int]:
        """The end-of-text token, unless the last but white space is one."""
        end: Any = self.tokenizer.eos_token_id
        return [] if end is None or end in ids[-2:] else [end]


def _as_conversation(row: Conversation | Exchange) -> Conversation:
    if isinstance(row, Conversation):
        return row
    asked = {"role": USER, "content": row.prompt}
    if row.completion is None:
        return Conversation((asked,), (), row.where)
    return Conversation((asked, {"role": ASSISTANT, "content": row.completion}), (1,), row.where)


def _all_counted(ids: list[int]) -> Encoded:
    return Encoded(ids, [True] * len(ids))
