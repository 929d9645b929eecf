"""Asking a model, or a pair as it is served: how likely answers are after prompts, and what follows a prompt.

Both say what they find likeliest, token by token; nothing is drawn at random.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from workers.pruning.model.blocks import block_stack, head
from workers.pruning.model.measure import logits_at_once
from workers.pruning.model.pair import FirstToken
from workers.pruning.serving.handover import EVERY_TOKEN, Handover, KvTokenRule, LayerKV
from workers.pruning.serving.pair_server import continue_hidden, continue_logits, continued_kv, process_prompt

AT_ONCE = 8
"""Sequences in one batch."""
Tokens = Sequence[int]
Ended = Callable[[Tokens], bool]
"""Whether an answer is at its end, by its tokens so far."""
T = TypeVar("T")


@dataclass(frozen=True)
class Likelihood:
    """Of an answer after its prompt."""

    log: float
    """In nats, of all its tokens together."""
    greedy: bool
    """Whether it is what the model would say itself."""


@dataclass(frozen=True)
class ModelAlone:
    """One model, which reads prompts and answers. Prompts have a token or more."""

    model: PreTrainedModel

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        """All that are asked."""
        return (self.model,)

    @torch.no_grad()
    def likelihoods(self, asked: Sequence[tuple[Tokens, Tokens]]) -> list[Likelihood]:
        """Of each prompt with its answer, which may be empty. Both are read in one pass."""

        def of(batch: Sequence[tuple[Tokens, Tokens]]) -> Iterator[Likelihood]:
            ids = _padded([[*prompt, *answer][:-1] for prompt, answer in batch], block_stack(self.model).device)
            read = block_stack(self.model).body(input_ids=ids, use_cache=False).last_hidden_state
            for row, (prompt, answer) in zip(read, batch, strict=True):
                yield _likelihood(_scored(self.model, row[len(prompt) - 1 :][: len(answer)], answer))

        return _in_batches(asked, lambda one: len(one[0]) + len(one[1]), lambda size: 0, of)

    @torch.no_grad()
    def answers(self, prompts: Sequence[Tokens], *, most_tokens: int, ended: Ended) -> list[list[int]]:
        """What follows each prompt, until it has `ended` or is of `most_tokens`.

        Prompts of several lengths are read together, the shorter ones behind padding.
        """

        def of(batch: Sequence[Tokens]) -> list[list[int]]:
            reader = _Reader(self.model, [len(prompt) for prompt in batch])
            longest = max(map(len, batch))
            ids = _padded([[0] * (longest - len(prompt)) + list(prompt) for prompt in batch], reader.device)
            return _said(reader(ids), reader, most_tokens, ended)

        return _in_batches(prompts, len, lambda size: 0, of)


class _Reader:
    """Reads on for several sequences, whose prompts end at the same place."""

    def __init__(self, model: PreTrainedModel, prompt_tokens: Sequence[int]) -> None:
        self.device = block_stack(model).device
        self._model, self._cache = model, DynamicCache(config=model.config)
        self._body = block_stack(model).body
        self._takes_positions = "position_ids" in inspect.signature(self._body.forward).parameters
        longest = max(prompt_tokens)
        padding = torch.tensor([longest - tokens for tokens in prompt_tokens])
        self._seen = (torch.arange(longest) >= padding[:, None]).long()  # (batch, time)
        self._padded = bool(padding.any())
        self._read = 0

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits (batch, vocabulary) after tokens `ids` (batch, time)."""
        known: dict[str, Any] = {}
        if (more := self._read + ids.shape[1] - self._seen.shape[1]) > 0:
            self._seen = torch.cat([self._seen, torch.ones(len(ids), more, dtype=torch.long)], dim=1)
        if self._padded:
            known["attention_mask"] = self._seen.to(self.device)
            if self._takes_positions:
                positions = (self._seen.cumsum(1) - 1).clamp(min=0)
                known["position_ids"] = positions[:, self._read :].to(self.device)
        read = self._body(input_ids=ids, past_key_values=self._cache, use_cache=True, **known)
        self._read += ids.shape[1]
        return head(self._model, read.last_hidden_state[:, -1])


@dataclass(frozen=True)
class ServedPair:
    """A prefill model that reads prompts, and a decode model that goes on from what it is sent of them.

    What is read together has prompts of one length, of a token or more.
    """

    prefill: PreTrainedModel
    decode: PreTrainedModel
    layer_map: tuple[int, ...]
    """For each decode layer, the prefill layer whose keys and values it reads."""
    first_token: FirstToken
    rule: KvTokenRule = EVERY_TOKEN

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        """All that are asked: one where it serves both halves."""
        return (self.prefill,) if self.prefill is self.decode else (self.prefill, self.decode)

    @torch.no_grad()
    def likelihoods(self, asked: Sequence[tuple[Tokens, Tokens]]) -> list[Likelihood]:
        """Of each prompt with its answer, which may be empty.

        A prompt with several answers is read once for those that are read together.
        """

        def of(batch: Sequence[tuple[Tokens, Tokens]]) -> Iterator[Likelihood]:
            prompts = list(dict.fromkeys(tuple(prompt) for prompt, _ in batch))
            rows = [prompts.index(tuple(prompt)) for prompt, _ in batch]
            logits, sent = self._prefill(prompts)
            # What decode is asked of each answer: all of it, or all but what prefill has said.
            begun = logits.shape[1]
            ids = [[*([] if begun else prompt[-1:]), *answer[:-1]] for prompt, answer in batch]
            longest = max(map(len, ids))
            hidden = None if longest == 0 else self._continued(_of_rows(sent, rows), ids)
            for number, (row, (_, answer)) in enumerate(zip(rows, batch, strict=True)):
                by_prefill = _of_logits(logits[row], answer[:begun])
                by_decode = [] if hidden is None else [_scored(self.decode, hidden[number], answer[begun:])]
                yield _likelihood(by_prefill, *by_decode)

        return _in_batches(asked, lambda one: (len(one[0]), *one[0]), lambda key: key[0], of)

    @torch.no_grad()
    def answers(self, prompts: Sequence[Tokens], *, most_tokens: int, ended: Ended) -> list[list[int]]:
        """What follows each prompt, until it has `ended` or is of `most_tokens`."""

        def of(batch: Sequence[Tokens]) -> list[list[int]]:
            logits, sent = self._prefill(batch)
            stack, caches = block_stack(self.decode), continued_kv(block_stack(self.decode), sent)

            def go_on(ids: Tensor) -> Tensor:
                return continue_logits(stack, caches, ids)[:, -1]

            first = logits[:, 0] if logits.shape[1] else go_on(torch.tensor(sent.next_tokens)[:, None].to(stack.device))
            return _said(first, go_on, most_tokens, ended)

        return _in_batches(prompts, len, lambda length: length, of)

    def _prefill(self, prompts: Sequence[Tokens]) -> tuple[Tensor, Handover]:
        """As `process_prompt`."""
        ids = _padded(prompts, block_stack(self.prefill).device)
        return process_prompt(self.prefill, ids, self.layer_map, self.rule, self.first_token)

    def _continued(self, sent: Handover, ids: Sequence[Tokens]) -> Tensor:
        """Decode's last hidden states (batch, time, hidden) over tokens `ids`, which go on from what was sent."""
        stack = block_stack(self.decode)
        return continue_hidden(stack, continued_kv(stack, sent), _padded(ids, stack.device))


Asked = ModelAlone | ServedPair
Key = TypeVar("Key", bound=Any)


def _in_batches(
    asked: Sequence[T],
    order: Callable[[T], Key],
    together: Callable[[Key], object],
    answered: Callable[[Sequence[T]], Any],
) -> list[Any]:
    """What is answered to each of `asked`, a few at a time: in an order, and those together of which `together` is one.

    The longest first, so that memory that does not suffice shows at once.
    """
    places = sorted(range(len(asked)), key=lambda place: order(asked[place]), reverse=True)
    found: dict[int, Any] = {}
    for _, group in groupby(places, key=lambda place: together(order(asked[place]))):
        alike = list(group)
        for start in range(0, len(alike), AT_ONCE):
            batch = alike[start : start + AT_ONCE]
            found |= zip(batch, answered([asked[place] for place in batch]), strict=True)
    return [found[place] for place in range(len(asked))]


def _padded(rows: Sequence[Tokens], device: torch.device) -> Tensor:
    """Token ids (batch, time), zeros behind shorter rows."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def _of_rows(sent: Handover, rows: Sequence[int]) -> Handover:
    """What was sent of a batch's rows, each as often as it is named."""
    layers = tuple(
        LayerKV(one.source, one.ranges, *(torch.stack([of[row] for row in rows]) for of in (one.keys, one.values)))
        for one in sent.layers
    )
    return Handover(sent.handed_tokens, tuple(sent.next_tokens[row] for row in rows), sent.first_token, layers)


Scored = tuple[Tensor, Tensor]
"""Of tokens: their log-likelihoods, and whether each is the likeliest."""


def _of_logits(logits: Tensor, followed: Tokens) -> Scored:
    """Of logits (tokens, vocabulary) and as many tokens that followed, or fewer."""
    targets = torch.tensor(followed, dtype=torch.long, device=logits.device)
    chances = logits[: len(targets)].float().log_softmax(-1)
    return chances.gather(1, targets[:, None])[:, 0], chances.argmax(-1) == targets


def _scored(model: PreTrainedModel, hidden: Tensor, followed: Tokens) -> Scored:
    """The same of last hidden states (tokens, hidden). Logits are held for a part at a time."""
    step = logits_at_once(model)
    parts = [
        _of_logits(head(model, hidden[start : start + step]), followed[start : start + step])
        for start in range(0, max(len(followed), 1), step)
    ]
    return torch.cat([log for log, _ in parts]), torch.cat([greedy for _, greedy in parts])


def _likelihood(*parts: Scored) -> Likelihood:
    return Likelihood(sum(float(log.sum()) for log, _ in parts), all(bool(greedy.all()) for _, greedy in parts))


def _said(first: Tensor, go_on: Callable[[Tensor], Tensor], most_tokens: int, ended: Ended) -> list[list[int]]:
    """What follows prompts, by the logits `first` (batch, vocabulary) and those after each next token."""
    answers: list[list[int]] = [[] for _ in first]
    logits, open_ones = first, set(range(len(answers)))
    for number in range(most_tokens):
        newest = logits.argmax(-1)
        for row, token in enumerate(newest.tolist()):
            if row in open_ones:
                answers[row].append(token)
                if ended(answers[row]):
                    open_ones.remove(row)
        if not open_ones or number + 1 == most_tokens:
            break
        logits = go_on(newest[:, None])
    return answers
