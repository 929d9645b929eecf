"""Evaluation tasks and prompts, asked of models that are loaded already, each alone and as a pair."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pdtrim.contract.errors import ExtraNotInstalled, InvalidRequest
from pdtrim.contract.evaluation_tasks import GenerationSpec, InlineTask
from pdtrim.contract.results import TaskMetric, TaskResult
from pdtrim.contract.spec import EvaluationSpec
from workers.inputs.wording import Room, Tokens, Wording, cut, ends_of
from workers.pruning.model.blocks import block_stack
from workers.pruning.serving.asking import Asked


@dataclass(frozen=True)
class Tasks:
    """A job's tasks: those whose questions it brings, and those of lm-evaluation-harness, as that holds them."""

    inline: Sequence[InlineTask]
    named: Any | None
    """None where the job names none."""

    def __bool__(self) -> bool:
        return bool(self.inline) or self.named is not None


def load_tasks(tasks: Sequence[str | InlineTask]) -> Tasks:
    """The tasks with their questions. Only those that are named need lm-evaluation-harness.

    Raises: ExtraNotInstalled; as `harness.load`.
    """
    inline = {number: task for number, task in enumerate(tasks) if isinstance(task, InlineTask)}
    named = {number: task for number, task in enumerate(tasks) if isinstance(task, str)}
    if not named:
        return Tasks(list(inline.values()), None)
    if find_spec("lm_eval") is None:
        raise ExtraNotInstalled(
            "Tasks by name need lm-evaluation-harness, which this worker lacks. Install it on every worker with "
            "pip install 'pdtrim[eval]', or give the tasks' questions in the job.",
            param=f"evaluation.tasks[{min(named)}]",
        )
    # Takes seconds to import and is not everywhere installed.
    from workers.stages import harness

    taken = {task.task: number for number, task in inline.items()}
    return Tasks(list(inline.values()), harness.load(named, taken))


def check_asked(
    asked: EvaluationSpec, tasks: Tasks, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> None:
    """Hold tasks and prompts against the model's context and embedding, before hours go into it.

    The model need not have weights. Raises: InvalidRequest naming the prompt, or the task and the number of its
    question.
    """
    room = Room.of(model, tokenizer)
    for number, prompt in enumerate(asked.prompts or ()):
        if (found := room.fault(prompt, new_tokens=asked.sample_tokens)) is not None:
            raise InvalidRequest(f"Prompt {number}: {found}", param=f"evaluation.prompts[{number}]")
    for task, number, found in _faults(tasks, room, limit=asked.task_limit, seed=seed):
        raise InvalidRequest(f"Question {number} of the task {task}: {found}", param="evaluation.tasks")


def _faults(tasks: Tasks, room: Room, *, limit: int | None, seed: int) -> Iterator[tuple[str, int, str]]:
    for task in tasks.inline:
        generation = task.generation
        if generation is None:
            for number, question in enumerate(task.questions()[:limit]):
                for choice in question.choices:
                    if (found := room.fault(question.text, task.target_delimiter + choice)) is not None:
                        yield task.task, number, found
        else:
            for number, (text, _) in enumerate(task.open_questions()[:limit]):
                if (found := room.fault(text, new_tokens=generation.max_gen_toks)) is not None:
                    yield task.task, number, found
    if tasks.named is not None:
        from workers.stages import harness

        yield from harness.faults(tasks.named, room, limit=limit, seed=seed)


def measure_tasks(
    asked: Asked,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    *,
    limit: int | None,
    seed: int,
    on_forward: Callable[[], None],
) -> dict[str, TaskResult]:
    """Each of `load_tasks`' tasks' metrics, on the first `limit` questions or all of them.

    Questions begin as the tokenizer begins a text, with `<bos>` where there is one.
    `on_forward` is called before every forward pass and may raise to stop.
    """
    wording, model = Wording.of(tokenizer), asked.models[0]
    ends = ends_of(model, tokenizer)
    with _told(asked, on_forward):
        found = {task.task: _measured(task, asked, wording, ends, limit) for task in tasks.inline}
        if tasks.named is not None:
            from workers.stages import harness

            context_tokens = Room.of(model, tokenizer).context_tokens
            found |= harness.measure(
                asked, wording, ends, tasks.named, context_tokens=context_tokens, limit=limit, seed=seed
            )
    return found


def continuations(
    asked: Asked,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tokens],
    *,
    most_tokens: int,
    on_forward: Callable[[], None],
) -> list[str]:
    """How each of the prompts goes on, until the text ends or is of `most_tokens`. `on_forward` as `measure_tasks`."""
    wording = Wording.of(tokenizer)
    ended = wording.ended(ends_of(asked.models[0], tokenizer))
    with _told(asked, on_forward):
        answers = asked.answers(prompts, most_tokens=most_tokens, ended=ended)
    return [wording.said(answer, prompt) for prompt, answer in zip(prompts, answers, strict=True)]


@contextmanager
def _told(asked: Asked, on_forward: Callable[[], None]) -> Iterator[None]:
    with ExitStack() as hooks:
        for model in asked.models:
            first = block_stack(model).blocks[0]
            hooks.callback(first.register_forward_pre_hook(lambda module, args: on_forward()).remove)
        yield


def _measured(task: InlineTask, asked: Asked, wording: Wording, ends: Tokens, limit: int | None) -> TaskResult:
    if (generation := task.generation) is not None:
        return _generated(task, generation, asked, wording, ends, limit)
    questions = task.questions()[:limit]
    answers = [
        wording.split(question.text, task.target_delimiter + choice)
        for question in questions
        for choice in question.choices
    ]
    found = iter(asked.likelihoods(answers))
    right, normed = [], []
    for question in questions:
        logs = [next(found).log for _ in question.choices]
        by_length = [log / len(choice) for log, choice in zip(logs, question.choices, strict=True)]
        right.append(float(logs.index(max(logs)) == question.target))
        normed.append(float(by_length.index(max(by_length)) == question.target))
    return {"acc": _mean(right), "acc_norm": _mean(normed)}


def _generated(
    task: InlineTask, generation: GenerationSpec, asked: Asked, wording: Wording, ends: Tokens, limit: int | None
) -> TaskResult:
    questions = task.open_questions()[:limit]
    answers = asked.answers(
        [wording.prompt(text) for text, _ in questions],
        most_tokens=generation.max_gen_toks,
        ended=wording.ended(ends, generation.until),
    )
    said = [cut(wording.said(answer), generation.until).strip() for answer in answers]
    right = [float(answer == target.strip()) for answer, (_, target) in zip(said, questions, strict=True)]
    return {"exact_match": _mean(right)}


def _mean(values: Sequence[float]) -> TaskMetric:
    """With its standard error over questions."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return TaskMetric(value=statistics.fmean(values), stderr=error)
