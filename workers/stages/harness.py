"""Tasks of lm-evaluation-harness, asked of models and pairs. Imported only where the harness is installed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import evaluate.config
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate as evaluated
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pdtrim.contract.errors import InvalidRequest, SourceUnreadable
from pdtrim.contract.results import TaskMetric, TaskResult
from workers.inputs.wording import Room, Wording, cut
from workers.pruning.serving.asking import Asked

BOOTSTRAP_ITERATIONS = 1000
"""Resamples for the standard error of metrics that have no formula for it."""
ROLLING_TOKENS = 2048
"""Windows of running text, where a model's configuration bounds none."""

# Metrics that the harness lacks are Python files on the hub, which `evaluate` would fetch and run.
evaluate.config.HF_EVALUATE_OFFLINE = True


def load(names: Mapping[int, str], taken: Mapping[str, int]) -> Any:
    """The harness's tasks, with their questions. `names` and `taken` are by their places in the job's list.

    A name is looked up among the harness's own tasks only: it is never a path. No remote code is run.
    Raises: InvalidRequest for a name that is unknown, taken, given twice or not to be run here; SourceUnreadable when
    its data cannot be had.
    """
    manager = TaskManager()
    loaded: list[Any] = []
    owners = dict(taken)  # leaf task → position of the given task that it belongs to
    for number, name in names.items():
        found = _named(manager, name, f"evaluation.tasks[{number}]")
        for part in found["tasks"]:
            if part in owners:
                first, second = sorted((owners[part], number))
                raise InvalidRequest(
                    f"The task {part} is part of evaluation.tasks[{first}] too.", param=f"evaluation.tasks[{second}]"
                )
            owners[part] = number
        # A group's own figures are wanted beside its tasks'.
        group = found["groups"].get(name)
        loaded += found["tasks"].values() if group is None else [group]
    return manager.load(loaded)


def _named(manager: Any, task: str, param: str) -> Any:
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
    if (task.get_config("generation_kwargs") or {}).get("do_sample"):
        return "its answers are drawn at random, and those of models and pairs are greedy here"
    return None


def faults(tasks: Any, room: Room, *, limit: int | None, seed: int) -> Iterator[tuple[str, int, str]]:
    """Task, number of the question, and why it is not to be asked."""
    for name, task in _prepared(tasks, seed=seed).items():
        task.build_all_requests(limit=limit)
        for request in task.instances:
            text, *rest = request.args
            if request.request_type == "loglikelihood":
                found = room.fault(text, rest[0])
            elif request.request_type == "generate_until":
                found = room.fault(text, new_tokens=normalize_gen_kwargs(dict(rest[0]))["max_gen_toks"])
            else:  # Running text is cut into windows.
                continue
            if found is not None:
                yield name, request.doc_id, found


def _prepared(tasks: Any, *, seed: int) -> Mapping[str, Any]:
    """The tasks by name, with examples chosen by the seed, and none where the task does not say how many."""
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    prepared: Mapping[str, Any] = tasks["tasks"]
    return prepared


def measure(
    asked: Asked,
    wording: Wording,
    ends: Sequence[int],
    tasks: Any,
    *,
    context_tokens: int | None,
    limit: int | None,
    seed: int,
) -> dict[str, TaskResult]:
    """Each task's metrics, on the first `limit` questions or all of them."""
    _prepared(tasks, seed=seed)
    found = evaluated(
        lm=AskedThrough(asked, wording, ends, context_tokens or ROLLING_TOKENS),
        task_dict=tasks,
        limit=limit,
        bootstrap_iters=BOOTSTRAP_ITERATIONS,
        log_samples=False,
    )
    results = {task: _metrics(result) for task, result in found["results"].items()}
    return {task: metrics for task, metrics in results.items() if metrics}


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


class AskedThrough(TemplateLM):
    """A model or a pair, as the harness asks it. Its methods are the harness's."""

    def __init__(self, asked: Asked, wording: Wording, ends: Sequence[int], context_tokens: int) -> None:
        super().__init__()
        self._asked, self._wording, self._ends, self._context_tokens = asked, wording, ends, context_tokens

    @property
    def eot_token_id(self) -> int:
        """What stands before an answer to nothing."""
        return self._wording.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """As the tokenizer begins a text, but where that is not wanted."""
        ids = self._wording.ids(string)
        return ids if add_special_tokens is not False else ids[len(self._wording.opening) :]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = self._asked.likelihoods([(prompt, answer) for _, prompt, answer in requests])
        return [(one.log, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of running texts, which are cut into windows that the model can read."""
        sums = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self._context_tokens, context_len=1
            )
            found = self._asked.likelihoods(list(map(make_disjoint_window, windows)))
            sums.append(sum(one.log for one in found))
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers; those that end alike are made together."""
        alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for place, request in enumerate(requests):
            options = normalize_gen_kwargs(dict(request.args[1]))
            until = tuple(text for text in options.get("until") or [] if text)
            alike.setdefault((options["max_gen_toks"], until), []).append(place)
        said: dict[int, str] = {}
        for (most_tokens, until), places in alike.items():
            prompts = [self._wording.prompt(requests[place].args[0]) for place in places]
            ended = self._wording.ended(self._ends, until)
            answers = self._asked.answers(prompts, most_tokens=most_tokens, ended=ended)
            said |= {
                place: cut(self._wording.said(answer), until) for place, answer in zip(places, answers, strict=True)
            }
        return [said[place] for place in range(len(requests))]
