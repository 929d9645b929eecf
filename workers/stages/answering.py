"""Healing on the dense model's own answers: it answers the prompts of the data, a few at a time, and they are kept."""

from __future__ import annotations

import json

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from pdtrim.contract.jobs import StageName
from pdtrim.contract.results.distillation import OwnAnswers
from workers.inputs.encoding import Encoded
from workers.inputs.models import load_tokenizer
from workers.inputs.prompts import packed, unpacked
from workers.inputs.windows import Stream
from workers.inputs.wording import ends_of
from workers.pruning.model.calibration import Frame
from workers.pruning.repair.answering import answers
from workers.pruning.repair.answers import marked
from workers.stages.context import StageContext
from workers.stages.scoring import PROMPTS

ANSWERS = "answers.jsonl"
"""The stage's artifact that holds prompts and answers as text."""
AT_ONCE = 32
"""Prompts that are answered in one batch, whose answers are kept together."""


def answered_windows(context: StageContext, model: PreTrainedModel, windows: int) -> tuple[Tensor, OwnAnswers]:
    """So many windows (windows, tokens), `marked`, of prompts and what the dense `model` answers, and what it took.

    Prompts are answered again, and otherwise, when all are. What an earlier attempt answered is not done again.
    Writes the answers as text. Raises: StoreUnavailable; what `context.say` raises.
    """
    prompts = unpacked(load_file(context.input(StageName.SCORING, PROMPTS)))
    tokenizer, tokens = load_tokenizer(context.model_dir), context.spec.calibration.window_tokens
    opening, ends = Frame.of(tokenizer).opening, ends_of(model, tokenizer)
    wanted = windows * (tokens - len(opening))
    rows: list[Encoded] = []
    made = said = number = 0
    with (context.out / ANSWERS).open("w", encoding="utf-8") as file:
        while made < wanted:
            batch = [prompts[(number * AT_ONCE + place) % len(prompts)] for place in range(AT_ONCE)]
            answered = _kept(context, number)
            if answered is None:
                most = tokens - len(opening) - max(map(len, batch))
                asked = [[*opening, *prompt] for prompt in batch]
                seed = context.spec.seed * 1_000_003 + number
                answered = answers(model, asked, most_tokens=most, ends=ends, seed=seed)
                context.save_tensors(_name(number), packed(answered))
            for prompt, answer in zip(batch, answered, strict=True):
                rows.append(_row(prompt, answer, ends))
                made, said = made + len(rows[-1].ids), said + len(answer)
                text = {"prompt": tokenizer.decode(prompt), "answer": tokenizer.decode(answer)}
                file.write(json.dumps(text, ensure_ascii=False) + "\n")
            number += 1
            context.say(0.0, "Answering the prompts.", answered=len(rows), tokens=made, wanted=wanted)
    ids, counted = Stream.of(rows, wanted).windows(opening, tokens)
    found = OwnAnswers(prompts=len(prompts), answers=len(rows), tokens=said)
    return marked(ids[:windows], counted[:windows]), found


def _row(prompt: list[int], answer: list[int], ends: list[int]) -> Encoded:
    """A prompt and its answer, which counts, and an end that does not where the answer has none."""
    end = ends[:1] if not answer or answer[-1] not in ends else []
    return Encoded([*prompt, *answer, *end], [*[False] * len(prompt), *[True] * len(answer), *[False] * len(end)])


def _kept(context: StageContext, number: int) -> list[list[int]] | None:
    kept = context.load_tensors(_name(number))
    return None if kept is None else unpacked(kept)


def _name(number: int) -> str:
    return f"answers-{number}.safetensors"
