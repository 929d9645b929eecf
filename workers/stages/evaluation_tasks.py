"""Evaluation tasks, run by lm-evaluation-harness on models that are loaded already."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from importlib.util import find_spec
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pdtrim.contract.errors import ExtraNotInstalled, InvalidRequest, SourceUnreadable
from pdtrim.contract.evaluation_tasks import InlineTask
from pdtrim.contract.results import TaskMetric, TaskResult
from workers.inputs.models import embedded_tokens
from workers.inputs.windows import without_embedding
from workers.pruning.model.calibration import Frame

BATCH_SIZE = 8
BOOTSTRAP_ITERATIONS = 1000
"""Resamples for the standard error of metrics that have no formula for it."""


def load_tasks(tasks: Sequence[str | InlineTask]) -> Any | None:
    """The tasks with their questions, as the harness holds them; None when there are none.

    A name is looked up among the harness's own tasks only: it is never a path. No remote code is run.
    Raises: ExtraNotInstalled; InvalidRequest for a name that is unknown, given twice or not to be run here;
    SourceUnreadable when its data cannot be had.
    """
    if not tasks:
        return None
    if find_spec("lm_eval") is None:
        raise ExtraNotInstalled(
            "evaluation.tasks needs lm-evaluation-harness, which this worker lacks. Install it on every worker with "
            "pip install 'pdtrim[eval]', or leave the tasks out.",
            param="evaluation.tasks",
        )
    # Takes seconds to import and is not everywhere installed.
    import evaluate.config
    from lm_eval.tasks import TaskManager

    # Metrics that the harness lacks are Python files on the hub, which `evaluate` would fetch and run.
    evaluate.config.HF_EVALUATE_OFFLINE = True

    # Reading the index of all the harness's tasks takes a while too.
    manager = TaskManager(include_defaults=any(isinstance(task, str) for task in tasks))
    loaded: list[Any] = []
    owners: dict[str, int] = {}  # leaf task → position of the given task that it belongs to
    for number, task in enumerate(tasks):
        param = f"evaluation.tasks[{number}]"
        if isinstance(task, InlineTask):
            found = manager.load([_inline_task(task)])
        else:
            found = _named_task(manager, task, param)
        for name in found["tasks"]:
            if name in owners:
                raise InvalidRequest(f"The task {name} is part of evaluation.tasks[{owners[name]}] too.", param=param)
            owners[name] = number
        # A group's own figures are wanted beside its tasks'.
        group = None if isinstance(task, InlineTask) else found["groups"].get(task)
        loaded += found["tasks"].values() if group is None else [group]
    return manager.load(loaded)


def _named_task(manager: Any, task: str, param: str) -> Any:
    if task not in manager.all_tasks:
        raise InvalidRequest(
            f"lm-evaluation-harness has no task {task!r}; `lm-eval ls tasks` lists those it has.", param=param
        )
    try:
        found = manager.load([task])
    except (OSError, ValueError, LookupError, ImportError, RuntimeError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceUnreadable(f"The task {task} cannot be loaded: {first_line}", param=param) from error
    for name, part in found["tasks"].items():
        if reason := _unfit(part):
            raise InvalidRequest(f"The task {name} cannot be run here: {reason}.", param=param)
    return found


def _unfit(task: Any) -> str | None:
    """Why one of the harness's tasks is not run, if it is not."""
    if getattr(task, "UNSAFE_CODE", False):
        return "it runs code that the model writes"
    if getattr(task, "MULTIMODAL", False):
        return "it asks about images or sound"
    metrics = getattr(task, "_metric_fn_list", {})
    if task.get_config("process_results") is None and None in metrics.values():
        return f"its metric {next(name for name, found in metrics.items() if found is None)} is code on the hub"
    return None


def _inline_task(task: InlineTask) -> Any:
    """The harness's task for a job's own. It gets every text ready-made, so it has no template to render."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    rows = [question._asdict() for question in task.questions()]

    def column(name: str) -> Callable[[Mapping[str, Any]], Any]:
        return lambda row: row[name]

    return ConfigurableTask(
        config={
            "task": task.task,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": task.output_type,
            "doc_to_text": column("text"),
            "doc_to_choice": column("choices"),
            "doc_to_target": column("target"),
            "target_delimiter": task.target_delimiter,
            "num_fewshot": 0,
        }
    )


def check_tasks(
    tasks: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, limit: int | None, seed: int
) -> None:
    """Hold what `load_tasks`' tasks ask against the model's context and embedding, before hours go into the model.

    Raises: InvalidRequest naming the task and the number of its question.
    """
    from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length

    context_tokens = resolve_max_length(model.config, tokenizer)
    embeddings = embedded_tokens(model)
    all_embedded = max(tokenizer.get_vocab().values()) < embeddings

    def fault(text: str, answer: str) -> str | None:
        # A token is a byte or more, so that most need not be counted.
        if not all_embedded and (highest := max(tokenizer(text + answer)["input_ids"], default=0)) >= embeddings:
            return without_embedding(highest, tokenizer, embeddings)
        if len(answer.encode()) > context_tokens:
            tokens = len(tokenizer(text + answer)["input_ids"]) - len(tokenizer(text)["input_ids"])
            if tokens > context_tokens:
                return f"An answer has {tokens} tokens, but the model reads at most {context_tokens}."
        return None

    def too_much(options: Mapping[str, Any]) -> str | None:
        asked = normalize_gen_kwargs(dict(options))["max_gen_toks"]
        if asked >= context_tokens:
            return f"It asks for answers of {asked} tokens, but the model reads at most {context_tokens}."
        return None

    for name, task in _prepared(tasks, seed=seed).items():
        task.build_all_requests(limit=limit)
        for request in task.instances:
            text, *rest = request.args
            answer = rest[0] if rest and isinstance(rest[0], str) else ""
            found = fault(text, answer) or (too_much(rest[0]) if rest and isinstance(rest[0], Mapping) else None)
            if found is not None:
                raise InvalidRequest(f"Question {request.doc_id} of the task {name}: {found}", param="evaluation.tasks")


def _prepared(tasks: Any, *, seed: int) -> Mapping[str, Any]:
    """The tasks by name, with examples chosen by the seed, and none where the task does not say how many."""
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    prepared: Mapping[str, Any] = tasks["tasks"]
    return prepared


def measure_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Any,
    *,
    limit: int | None,
    seed: int,
    on_forward: Callable[[], None],
) -> dict[str, TaskResult]:
    """Each of `load_tasks`' tasks' metrics for `model`, on the first `limit` questions or all of them.

    Questions begin as the tokenizer begins a text, with `<bos>` where there is one.
    `on_forward` is called before every forward pass and may raise to stop.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    _prepared(tasks, seed=seed)
    handle = model.register_forward_pre_hook(lambda module, args: on_forward())
    try:
        found = evaluate(
            lm=HFLM(pretrained=model, tokenizer=_unclosed(tokenizer), backend="causal", batch_size=BATCH_SIZE),
            task_dict=tasks,
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            log_samples=False,
        )
    finally:
        handle.remove()
    results = {task: _metrics(result) for task, result in found["results"].items()}
    return {task: metrics for task, metrics in results.items() if metrics}


def _unclosed(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer without the special tokens that it puts behind a text: the answer is to go on from there."""
    frame = Frame.of(tokenizer)
    if not frame.closing or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer
    unclosed = deepcopy(tokenizer)
    opening = [(unclosed.convert_ids_to_tokens(token), token) for token in frame.opening]
    unclosed.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*(name for name, _ in opening), "$A"], special_tokens=opening
    )
    return unclosed


def _metrics(result: Mapping[str, Any]) -> TaskResult:
    """From the harness's flat keys: `acc,none` and `acc_stderr,none`, where `none` is the filter of the answers."""
    metrics: TaskResult = {}
    for key, value in result.items():
        name, comma, answers = key.partition(",")
        if comma and not name.endswith("_stderr"):
            shown = name if answers == "none" else key
            error = result.get(f"{name}_stderr,{answers}")
            metrics[shown] = TaskMetric(value=_finite(value), stderr=_finite(error))
    return metrics


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
