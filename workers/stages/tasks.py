"""Evaluation tasks, run by lm-evaluation-harness on models that are loaded already."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from service.contract.errors import ExtraNotInstalled, InvalidRequest, SourceUnreadable
from service.contract.tasks import InlineTask

BATCH_SIZE = 8
BOOTSTRAP_ITERATIONS = 1000
"""Resamples for the standard error of metrics that have no formula for it."""
TaskResult = dict[str, dict[str, float | None]]
"""Metric → `value` and `stderr`, its standard error over questions; None where it is unknown or not finite."""


def load_tasks(tasks: Sequence[str | InlineTask]) -> Any | None:
    """The tasks with their questions, as the harness holds them; None when there are none.

    A name is looked up among the harness's own tasks only: it is never a path. No remote code is run.
    Raises: ExtraNotInstalled; InvalidRequest for an unknown name; SourceUnreadable when its data cannot be had.
    """
    if not tasks:
        return None
    if find_spec("lm_eval") is None:
        raise ExtraNotInstalled(
            "evaluation.tasks needs lm-evaluation-harness, which this worker lacks. Install it on every worker with "
            "pip install 'pdtrim-service[eval]', or leave the tasks out.",
            param="evaluation.tasks",
        )
    # Takes seconds to import and is not everywhere installed.
    from lm_eval.tasks import TaskManager

    # Reading the index of all the harness's tasks takes a while too.
    manager = TaskManager(include_defaults=any(isinstance(task, str) for task in tasks))
    known = set(manager.all_tasks)
    loaded = []
    for number, task in enumerate(tasks):
        if isinstance(task, InlineTask):
            loaded.append(_inline_task(task))
            continue
        param = f"evaluation.tasks[{number}]"
        if task not in known:
            raise InvalidRequest(
                f"lm-evaluation-harness has no task {task!r}; `lm-eval ls tasks` lists those it has.", param=param
            )
        try:
            found = manager.load([task])
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SourceUnreadable(f"The task {task} cannot be loaded: {reason}", param=param) from error
        traits = ("UNSAFE_CODE", "MULTIMODAL")
        if unfit := [name for name, one in found["tasks"].items() if any(getattr(one, t, False) for t in traits)]:
            raise InvalidRequest(
                f"The task {unfit[0]} runs code that the model writes, or asks about images or sound; this service "
                "measures text alone and runs no code.",
                param=param,
            )
        group = found["groups"].get(task)  # Its own figures are wanted beside its tasks'.
        loaded += found["tasks"].values() if group is None else [group]
    try:
        return manager.load(loaded)
    except ValueError as error:
        raise InvalidRequest(f"The tasks overlap: {error}", param="evaluation.tasks") from error


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

    `on_forward` is called before every forward pass and may raise to stop.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    handle = model.register_forward_pre_hook(lambda module, args: on_forward())
    try:
        found = evaluate(
            lm=HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=BATCH_SIZE),
            task_dict=tasks,
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            log_samples=False,
        )
    finally:
        handle.remove()
    results = {task: _metrics(result) for task, result in found["results"].items()}
    return {task: metrics for task, metrics in results.items() if metrics}


def _metrics(result: Mapping[str, Any]) -> TaskResult:
    """From the harness's flat keys: `acc,none` and `acc_stderr,none`, where `none` is the filter of the answers."""
    metrics: TaskResult = {}
    for key, value in result.items():
        name, comma, answers = key.partition(",")
        if comma and not name.endswith("_stderr"):
            shown = name if answers == "none" else key
            metrics[shown] = {"value": _finite(value), "stderr": _finite(result.get(f"{name}_stderr,{answers}"))}
    return metrics


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
