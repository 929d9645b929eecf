"""How models are asked in text: the tokens of prompts and answers, and where an answer ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pdtrim.contract.architectures import CONTEXT_KEYS
from workers.inputs.models import embedded_tokens
from workers.inputs.windows import without_embedding
from workers.pruning.model.calibration import Frame

Tokens = Sequence[int]
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those of the model's generation configuration."""
    settings: Any = model.generation_config
    named = None if settings is None else settings.eos_token_id
    found = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return list(dict.fromkeys(end for end in found if end is not None))


@dataclass(frozen=True)
class Wording:
    """A tokenizer, and the special tokens with which it begins a text; behind a prompt it puts none."""

    tokenizer: PreTrainedTokenizerBase
    opening: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Wording:
        """Of a tokenizer, as it is."""
        return cls(tokenizer, Frame.of(tokenizer).opening)

    @property
    def prefix(self) -> int:
        """What stands before an answer to nothing."""
        found: int | None = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id or 0) if found is None else found

    def ids(self, text: str) -> list[int]:
        """A text that may begin with its opening already."""
        bare: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        begun = tuple(bare[: len(self.opening)]) == self.opening
        return bare if begun else [*self.opening, *bare]

    def prompt(self, text: str) -> list[int]:
        """What a model goes on from: a token or more."""
        return self.ids(text) or [self.prefix]

    def split(self, text: str, answer: str) -> tuple[list[int], list[int]]:
        """A prompt and the answer to it, cut where lm-evaluation-harness cuts: white space belongs to the answer."""
        asked = text.rstrip()
        answer = text[len(asked) :] + answer
        if not asked:
            whole = self.prompt(answer)
            prompt = list(self.opening) or [self.prefix]
            return prompt, whole[len(self.opening) :] or [self.prefix]
        whole, prompt = self.ids(asked + answer), self.prompt(asked)
        if len(whole) > len(prompt):
            return prompt, whole[len(prompt) :]
        # The answer's first letters make one token with the prompt's last ones.
        return whole[:-1] or [self.prefix], whole[-1:]

    def said(self, answer: Tokens, prompt: Tokens = ()) -> str:
        """The text of an answer, as it goes on from its prompt."""
        before, whole = self._text(prompt), self._text([*prompt, *answer])
        return whole[len(before) :] if whole.startswith(before) else self._text(answer)

    def _text(self, ids: Tokens) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def ended(self, ends: Tokens, until: Sequence[str] = ()) -> Callable[[Tokens], bool]:
        """Whether an answer has come to one of the tokens or of the texts."""

        def has_ended(answer: Tokens) -> bool:
            if answer[-1] in ends:
                return True
            return bool(until) and any(text in self.said(answer) for text in until)

        return has_ended


def cut(answer: str, until: Sequence[str]) -> str:
    """What an answer says before the first of some texts."""
    for text in until:
        answer = answer.split(text)[0]
    return answer


def readable(text: str) -> str:
    """A model's text without what databases do not store and terminals obey."""
    return CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


@dataclass(frozen=True)
class Room:
    """What a model can be asked at all."""

    wording: Wording
    context_tokens: int | None
    """None where its configuration bounds nothing."""
    embeddings: int

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Room:
        """Of a model, which need not have weights."""
        found = (getattr(model.config, key, None) for key in CONTEXT_KEYS)
        context = next((tokens for tokens in found if isinstance(tokens, int)), None)
        return cls(Wording.of(tokenizer), context, embedded_tokens(model))

    def fault(self, text: str, answer: str = "", new_tokens: int = 0) -> str | None:
        """Why a text is not to be asked, with its answer or with so many tokens still to be said; None if it is."""
        tokenizer = self.wording.tokenizer
        all_embedded = max(tokenizer.get_vocab().values()) < self.embeddings
        most = self.context_tokens
        # Hardly any token is of less than a byte, so that most texts need not be cut into tokens.
        most_tokens = 2 * (len(text.encode()) + len(answer.encode())) + len(self.wording.opening) + new_tokens
        if all_embedded and (most is None or most_tokens <= most):
            return None
        prompt, said = self.wording.split(text, answer) if answer else (self.wording.prompt(text), [])
        if (highest := max([*prompt, *said])) >= self.embeddings:
            return without_embedding(highest, tokenizer, self.embeddings)
        # A model does not read the last token that it is asked for.
        if most is None or len(prompt) + len(said) + new_tokens - 1 <= most:
            return None
        parts = f"{len(prompt)} tokens" + (f", its answer {len(said)}" if answer else "")
        more = f", and {new_tokens} are to follow" if new_tokens else ""
        return f"It has {parts}{more}, but the model reads at most {most}."
