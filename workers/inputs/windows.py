"""A job's data as token windows for calibration, training and validation, which never overlap."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pdtrim.contract.errors import InvalidRequest
from pdtrim.contract.spec import JobSpec
from pdtrim.contract.windows import Split, least_windows, wanted_windows
from service.sources import Row, Text
from service.stopping import Check, go_on
from workers.inputs.encoding import Encoded, Encoder
from workers.inputs.prompts import EVERY, Prompts, in_parts
from workers.pruning.model.calibration import Frame, cut_windows, deal, mixed, stdlib_documents, token_stream

ANSWERS = "answers."
"""What stands before the name of a use where the tokens are not given, but whether each is of an answer."""


@dataclass(frozen=True)
class Windows:
    """Token ids by use, each (windows, tokens), and, of data that asks, whether each token is of an answer."""

    ids: dict[Split, Tensor]
    answers: dict[Split, Tensor] = field(default_factory=dict)
    prompts: list[list[int]] = field(default_factory=list)
    """Token ids of what the dense model is to answer, where healing trains on its answers."""
    warnings: list[str] = field(default_factory=list)
    """What there was less of than was asked for, a sentence each."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All by name, as they are kept."""
        answers = {f"{ANSWERS}{split}": part for split, part in self.answers.items()}
        return dict(self.ids.items()) | answers


@dataclass(frozen=True)
class Stream:
    """Token ids in a row, (tokens,), and whether each counts."""

    ids: Tensor
    counted: Tensor

    @classmethod
    def of(cls, rows: Iterable[Encoded], at_least: int) -> Stream:
        """The first rows with so many tokens in all, or all rows."""
        ids, counted = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.bool)]
        read = 0
        for row in rows:
            ids.append(torch.tensor(row.ids, dtype=torch.long))
            counted.append(torch.tensor(row.counted, dtype=torch.bool))
            read += len(row.ids)
            if read >= at_least:
                break
        return cls(torch.cat(ids), torch.cat(counted))

    def windows(self, opening: Sequence[int], tokens: int) -> tuple[Tensor, Tensor]:
        """As many as there are: ids and whether they count, (windows, tokens) both. `opening` begins each."""
        taken = tokens - len(opening)
        count = len(self.ids) // taken
        ids, counted = (part[: count * taken].view(count, taken) for part in (self.ids, self.counted))
        begin = torch.tensor(opening, dtype=torch.long).expand(count, -1)
        return torch.cat([begin, ids], 1), torch.cat([torch.zeros_like(begin, dtype=torch.bool), counted], 1)


def token_windows(
    spec: JobSpec, rows: Iterable[Row] | None, tokenizer: PreTrainedTokenizerBase, check: Check = go_on
) -> Windows:
    """The windows of a job. None for `rows` means the Python standard library.

    Each begins as the tokenizer begins a text. No more is read than the windows need that are asked for; of less, each
    use gets its share. Asks `check` all the while.
    Raises: InvalidRequest when there is too little text; what `rows` raise.
    """
    tokens = spec.calibration.window_tokens
    opening = Frame.of(tokenizer).opening
    if 2 * len(opening) >= tokens:
        raise InvalidRequest(
            f"calibration.window_tokens is {tokens}, but the model's tokenizer begins every text with {len(opening)} "
            "special tokens, which leaves no prompt.",
            param="calibration.window_tokens",
        )
    taken = tokens - len(opening)
    wanted, least = wanted_windows(spec), least_windows(spec)
    encoder = Encoder(tokenizer, opening)
    prompts = Prompts(encoder, tokens, spec.distillation.heal_tokens if spec.distillation.data == "self" else 0)
    if rows is None:
        prompts.rest(in_parts(_stdlib_rows("train", spec.seed), tokens), check)
        return Windows(
            {
                split: mixed(
                    cut_windows(
                        _stdlib_stream(split, count * taken, spec.seed, tokenizer, check),
                        count=count,
                        tokens=tokens,
                        seed=spec.seed,
                        opening=opening,
                    ),
                    spec.seed,
                )
                for split, count in wanted.items()
            },
            prompts=prompts.found,
        )
    if prompts.wanted_tokens:
        rows = in_parts(rows, tokens)
    left = iter(rows)
    stream = Stream.of(encoder.encoded(prompts.beside(left), check), sum(wanted.values()) * taken)
    ids_of, counted = stream.windows(opening, tokens)
    if len(ids_of) < sum(least.values()):
        raise InvalidRequest(
            f"the data has {len(stream.ids)} tokens, {len(ids_of)} windows of {tokens}; "
            f"{sum(least.values())} are the least: {_listed(least)}. Give more text or a smaller "
            "calibration.window_tokens",
            param="data",
        )
    prompts.rest(left, check)
    if prompts.wanted_tokens and not prompts.found:
        raise InvalidRequest(
            f"the data has no prompt of at most {prompts.longest} tokens, half a window, of which one row in "
            f"{EVERY} is kept for calibration and validation; {prompts.left_out} prompts are longer. Give more rows, "
            "or a larger calibration.window_tokens",
            param="data",
        )
    places = deal(len(ids_of), wanted, least)
    found = {split: mixed(ids_of[chosen], spec.seed) for split, chosen in places.items()}
    warnings = _warnings(spec, {split: len(part) for split, part in found.items()}, prompts)
    if stream.counted.all():
        return Windows(found, {}, prompts.found, warnings)
    answers = {split: mixed(counted[chosen], spec.seed) for split, chosen in places.items()}
    return Windows(found, answers, prompts.found, warnings)


def _warnings(spec: JobSpec, counts: Mapping[Split, int], prompts: Prompts) -> list[str]:
    """Where there are fewer windows than asked for, and how many prompts were too long."""
    wanted, tokens = wanted_windows(spec), spec.calibration.window_tokens
    said = [
        f"The data has {counts[split]} windows for {NAMES[split]}; {wanted[split]} were asked for."
        for split in ("calibration", "validation")
        if counts[split] < wanted[split]
    ]
    if counts["train"] < wanted["train"] and spec.distillation.enabled:
        said.append(
            f"The data has {counts['train'] * tokens:,} tokens for training; {spec.distillation.heal_tokens:,} were "
            "asked for. They are read again and again."
        )
    if prompts.left_out:
        said.append(
            f"{prompts.left_out:,} of {prompts.left_out + len(prompts.found):,} prompts have more than "
            f"{prompts.longest} tokens, half a window, and were left out."
        )
    return said


def _stdlib_stream(split: Split, tokens: int, seed: int, tokenizer: PreTrainedTokenizerBase, check: Check) -> Tensor:
    return token_stream(_shuffled(split, seed), tokenizer, at_least=tokens, check=check)


def _stdlib_rows(split: Split, seed: int) -> Iterator[Row]:
    return (Text(document, "builtin:stdlib") for document in _shuffled(split, seed))


def _shuffled(split: Split, seed: int) -> list[str]:
    documents = list(stdlib_documents(split))
    random.Random(seed).shuffle(documents)
    return documents


def _listed(counts: Mapping[Split, int]) -> str:
    return ", ".join(f"{count} for {NAMES[split]}" for split, count in counts.items())


NAMES: Mapping[Split, str] = {"train": "training", "calibration": "calibration", "validation": "validation"}


def check_tokens(windows: Windows, tokenizer: PreTrainedTokenizerBase, *, embeddings: int) -> None:
    """Hold every token of windows against the embeddings there are. Raises: InvalidRequest."""
    for part in windows.ids.values():
        if part.numel() and (highest := int(part.max())) >= embeddings:
            raise InvalidRequest(without_embedding(highest, tokenizer, embeddings), param="model.source")


def without_embedding(token: int, tokenizer: PreTrainedTokenizerBase, embeddings: int) -> str:
    """What is said of a token that the model's embedding has no row for."""
    return (
        f"The text has the token {tokenizer.convert_ids_to_tokens(token)!r}, which is number {token} of the model's "
        f"tokenizer, but the model embeds {embeddings}. Give the model with the tokenizer that belongs to it."
    )
