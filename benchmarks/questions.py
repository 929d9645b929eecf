"""Held-out windows that ask what users ask of long prompts: to go on, to copy, to find a needle, to look up.

All that follows the prompt of a window is the answer, and is what counts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workers.pruning.model.pair import FirstToken, pair_logits

CONTINUATION_TOKENS = 128
COPIED_TOKENS = 64
DIGITS = 5
LINES = 24
PASSAGE_TOKENS = 24
CHOICES = 4
NAMES = (
    "amber",
    "birch",
    "cedar",
    "dune",
    "ember",
    "fern",
    "grove",
    "heath",
    "inlet",
    "jade",
    "knoll",
    "linen",
    "maple",
    "north",
    "olive",
    "pearl",
    "quartz",
    "ridge",
    "slate",
    "thorn",
    "umber",
    "vale",
    "willow",
    "yarrow",
)
"""Of lookups, a line each, and of needles."""


@dataclass(frozen=True)
class Questions:
    """Prompts and their answers, all of one length."""

    name: str
    windows: Tensor
    """Token ids (questions · choices, time), the choices of a question one after another, the right one first."""
    prompt_tokens: int
    choices: int = 1


def running_text(stream: Tensor, prompt_tokens: int, *, count: int, longest: int) -> Questions:
    """Continuations of 128 tokens that lie evenly in a stream (tokens,), with as much of the text before as asked for.

    The same continuations whatever the prompt, as long as `longest`, the longest that is asked for, is the same.
    Raises: ValueError when the continuations would overlap.
    """
    stride = (len(stream) - longest - CONTINUATION_TOKENS) // max(count - 1, 1)
    if stride < CONTINUATION_TOKENS:
        raise ValueError(f"{len(stream)} tokens are too few for {count} continuations")
    starts = [longest + number * stride for number in range(count)]
    windows = [stream[start - prompt_tokens : start + CONTINUATION_TOKENS] for start in starts]
    return Questions(f"text after {prompt_tokens:,}", torch.stack(windows), prompt_tokens)


def copied_spans(stream: Tensor, prompt_tokens: int, *, count: int) -> Questions:
    """The answer is 64 tokens from the middle of the prompt, as a document that quotes itself."""
    stride = (len(stream) - prompt_tokens) // max(count - 1, 1)
    prompts = torch.stack([stream[number * stride : number * stride + prompt_tokens] for number in range(count)])
    middle = (prompt_tokens - COPIED_TOKENS) // 2
    windows = torch.cat([prompts, prompts[:, middle : middle + COPIED_TOKENS]], dim=1)
    return Questions(f"copied from {prompt_tokens:,}", windows, prompt_tokens)


def needles(
    stream: Tensor, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, *, count: int, seed: int
) -> Questions:
    """A number that one sentence gives, somewhere in a prompt of running text that ends by asking for it."""
    rng, windows = random.Random(seed), []
    stride = (len(stream) - prompt_tokens) // max(count - 1, 1)
    for question in range(count):
        name, number = rng.choice(NAMES), _number(rng)
        needle = _ids(tokenizer, f"\nThe secret number of {name} is {number}.\n")
        asked = _ids(tokenizer, f"\nThe secret number of {name} is {number}")
        prompt, answer = asked[:-DIGITS], asked[-DIGITS:]
        text = stream[question * stride :][: prompt_tokens - len(needle) - len(prompt)].tolist()
        depth = rng.randrange(len(text))
        windows.append([*text[:depth], *needle, *text[depth:], *prompt, *answer])
    return Questions(f"needle in {prompt_tokens:,}", torch.tensor(windows), prompt_tokens)


def lookups(
    stream: Tensor, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, *, count: int, seed: int
) -> Questions:
    """The number beside a name in a list of 24 such lines, after as much running text as fills the prompt.

    Raises: ValueError where the prompt is shorter than the list.
    """
    rng, windows = random.Random(seed), []
    stride = (len(stream) - prompt_tokens) // max(count - 1, 1)
    for question in range(count):
        names = rng.sample(NAMES, LINES)
        numbers = {name: _number(rng) for name in names}
        asked = rng.choice(names)
        lines = "".join(f"{name}: {numbers[name]}\n" for name in names)
        ids = _ids(tokenizer, f"\n{lines}{asked}: {numbers[asked]}")
        prompt, answer = ids[:-DIGITS], ids[-DIGITS:]
        if len(prompt) > prompt_tokens:
            raise ValueError(f"a list of {LINES} lines takes {len(prompt)} tokens, a prompt has {prompt_tokens}")
        text = stream[question * stride :][: prompt_tokens - len(prompt)].tolist()
        windows.append([*text, *prompt, *answer])
    return Questions(f"lookup in {prompt_tokens:,}", torch.tensor(windows), prompt_tokens)


def next_passage(stream: Tensor, prompt_tokens: int, *, count: int, seed: int) -> Questions:
    """Which of four passages of 24 tokens goes on from the prompt: the others begin a little later in the same text."""
    rng, windows = random.Random(seed), []
    reach = 2 * prompt_tokens
    stride = (len(stream) - prompt_tokens - PASSAGE_TOKENS - reach) // max(count - 1, 1)
    for question in range(count):
        start = question * stride
        end = start + prompt_tokens
        later = [end + PASSAGE_TOKENS + rng.randrange(reach - PASSAGE_TOKENS) for _ in range(CHOICES - 1)]
        for begin in (end, *later):
            windows.append(torch.cat([stream[start:end], stream[begin : begin + PASSAGE_TOKENS]]))
    return Questions(f"next of {CHOICES} passages", torch.stack(windows), prompt_tokens, CHOICES)


def in_order(stream: Tensor, prompt_tokens: int, *, count: int, seed: int) -> Questions:
    """Which of four passages of 24 tokens is as it was written: in the others two tokens have changed places."""
    rng, windows = random.Random(seed), []
    stride = (len(stream) - prompt_tokens - PASSAGE_TOKENS) // max(count - 1, 1)
    for question in range(count):
        text = stream[question * stride :][: prompt_tokens + PASSAGE_TOKENS]
        windows.append(text)
        # The last place stays, so that every choice is followed by the same.
        places = [place for place in range(prompt_tokens, len(text) - 2) if text[place] != text[place + 1]]
        for place in rng.sample(places, CHOICES - 1):
            swapped = text.clone()
            swapped[place], swapped[place + 1] = text[place + 1], text[place]
            windows.append(swapped)
    return Questions(f"right of {CHOICES} orders", torch.stack(windows), prompt_tokens, CHOICES)


def _number(rng: random.Random) -> str:
    return "".join(rng.choice("123456789") for _ in range(DIGITS))


def writes_digits(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has a token for every digit of the numbers that are asked for."""
    try:
        _ids(tokenizer, "\n123: 123456789")
    except ValueError:
        return False
    return True


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text that ends with a number. Raises: ValueError unless its digits are a token each."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    digits = text.rstrip(".\n")[-DIGITS:]
    spelled = [str(tokenizer.decode([token])) for token in ids]
    if "".join(spelled).rstrip(".\n")[-DIGITS:] != digits or not all(len(s) == 1 for s in spelled if s.isdigit()):
        raise ValueError(f"the tokenizer does not write {digits} digit by digit: {spelled}")
    return ids


@dataclass(frozen=True)
class Answers:
    """How a pair does on questions, one by one."""

    losses: list[float]
    """Mean negative log-likelihood in nats a token of each right answer."""
    exact: list[bool]
    """Whether every token of the answer is the most likely one, given those before; of a choice, whether the right
    answer is the most likely one."""

    def above(self, dense: Answers) -> tuple[float, float]:
        """Mean loss above the dense model's, and the standard error of that, the questions paired."""
        differences = [own - its for own, its in zip(self.losses, dense.losses, strict=True)]
        return fmean(differences), stdev(differences) / len(differences) ** 0.5


@torch.no_grad()
def answered(
    prefill: PreTrainedModel,
    decode: PreTrainedModel,
    layer_map: Sequence[int],
    questions: Questions,
    *,
    first_token: FirstToken,
    batch: int,
) -> Answers:
    """The answers of a pair, where decode reads what prefill kept of the prompt."""
    losses: list[float] = []
    exact: list[bool] = []
    prompt = questions.prompt_tokens
    for ids in questions.windows.to(prefill.device).split(batch):
        logits = torch.cat(pair_logits(prefill, decode, layer_map, ids, prompt, first_token), dim=1).float()
        answer = ids[:, prompt:]
        by_token = F.cross_entropy(logits.flatten(0, 1), answer.flatten(), reduction="none").view(answer.shape)
        losses += by_token.mean(dim=1).tolist()
        exact += (logits.argmax(dim=-1) == answer).all(dim=1).tolist()
    if questions.choices == 1:
        return Answers(losses, exact)
    by_question = torch.tensor(losses).view(-1, questions.choices)
    return Answers(by_question[:, 0].tolist(), (by_question.argmin(dim=1) == 0).tolist())
