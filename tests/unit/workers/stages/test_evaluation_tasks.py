"""Evaluation tasks on real, tiny models; those that run the harness are left out where it is not installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pdtrim.contract.errors import ExtraNotInstalled, InvalidRequest, SourceUnreadable
from pdtrim.contract.evaluation_tasks import InlineTask
from pdtrim.contract.results import TaskResult
from pdtrim.contract.spec import EvaluationSpec
from tests.tiny_job import write_tiny_model
from tests.unit.workers.pruning.models import framed_tokenizer
from workers.inputs.models import load_model, load_tokenizer
from workers.inputs.wording import Wording
from workers.pruning.model.blocks import drop_blocks
from workers.pruning.model.checkpoint import empty_model
from workers.pruning.serving.asking import Asked, ModelAlone, ServedPair
from workers.stages import evaluation_tasks as stage
from workers.stages.evaluation_tasks import check_asked, continuations, load_tasks, measure_tasks

harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra `eval` is not installed")
TASK = InlineTask.model_validate(
    {
        "task": "sums",
        "docs": [
            {"a": a, "b": b, "choices": [str(a + b), str(a + b + 1), str(a * b + 7)]}
            for a in range(1, 5)
            for b in range(1, 4)
        ],
        "description": "Sums.\n",
        "doc_to_text": "{{a}} + {{b}} =",
        "doc_to_choice": "choices",
        "doc_to_target": 0,
    }
)


OPEN_TASK = InlineTask.model_validate(
    {
        "task": "copies",
        "output_type": "generate_until",
        "docs": [{"text": f"x = {a}\ny = ", "answer": str(a)} for a in range(8)],
        "doc_to_text": "text",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n", " "], "max_gen_toks": 6},
    }
)


def model_and_tokenizer(tmp_path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = write_tiny_model(tmp_path / "tiny")
    return load_model(folder), load_tokenizer(folder)


def pair_of(model: PreTrainedModel) -> ServedPair:
    blocks = model.config.num_hidden_layers
    return ServedPair(model, drop_blocks(model, {1}), (0, *range(2, blocks)), "decode")


def measured(
    asked: Asked, tokenizer: PreTrainedTokenizerBase, *tasks: InlineTask | str, limit: int | None = None
) -> dict[str, TaskResult]:
    return measure_tasks(asked, tokenizer, load_tasks(tasks), limit=limit, seed=0, on_forward=lambda: None)


def test_only_tasks_that_are_named_need_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "find_spec", lambda name: None)
    assert not load_tasks([])
    assert load_tasks([TASK])
    with pytest.raises(ExtraNotInstalled, match=r"pip install 'pdtrim\[eval\]'") as missing:
        load_tasks([TASK, "arc_easy"])
    assert missing.value.param == "evaluation.tasks[1]"


@pytest.mark.parametrize(("opening", "closing"), [((), ()), ((5,), ()), ((5,), (6,))])
def test_the_choice_that_the_model_finds_likeliest_has_to_be_the_right_one(
    opening: tuple[int, ...], closing: tuple[int, ...], tmp_path: Path
) -> None:
    model, tokenizer = load_model(write_tiny_model(tmp_path / "tiny")), framed_tokenizer(opening)
    calls: list[None] = []
    found = measure_tasks(
        ModelAlone(model),
        framed_tokenizer(opening, closing),
        load_tasks([TASK]),
        limit=None,
        seed=0,
        on_forward=lambda: calls.append(None),
    )

    def log_likelihood(text: str, choice: str) -> float:
        asked, whole = (tokenizer(given, return_tensors="pt").input_ids for given in (text, f"{text} {choice}"))
        with torch.no_grad():
            chances = model(input_ids=whole[:, :-1]).logits.log_softmax(-1)
        start = asked.shape[1]
        return float(chances[0, start - 1 :].gather(1, whole[0, start:, None]).sum())

    right = [
        max(range(3), key=lambda choice: log_likelihood(question.text, question.choices[choice])) == question.target
        for question in TASK.questions()
    ]
    assert 0 < sum(right) < len(right)
    assert found["sums"]["acc"].value == sum(right) / len(right)
    assert found["sums"]["acc"].stderr == pytest.approx(float(torch.tensor(right).float().std()) / len(right) ** 0.5)
    assert found["sums"].keys() == {"acc", "acc_norm"}
    assert calls
    assert measured(ModelAlone(model), tokenizer, TASK, limit=5)["sums"]["acc"].value == sum(right[:5]) / 5


def test_a_free_answer_has_to_be_the_right_one_but_for_white_space(tmp_path: Path) -> None:
    model, tokenizer = model_and_tokenizer(tmp_path)

    def answer(text: str) -> str:
        ids = tokenizer(text, return_tensors="pt").input_ids
        made = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
        said = str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
        return said.split("\n")[0].split(" ")[0].strip()

    texts = [f"x = {a}\ny =" for a in range(8)]
    docs = tuple({"text": text, "answer": answer(text) if n % 4 else "wrong"} for n, text in enumerate(texts))
    docs = tuple(doc if doc["answer"] else {**doc, "answer": "?"} for doc in docs)
    right = [doc["answer"] == answer(str(doc["text"])) for doc in docs]
    task = OPEN_TASK.model_copy(update={"docs": docs})
    found = measured(ModelAlone(model), tokenizer, task)["copies"]
    assert found.keys() == {"exact_match"}
    assert found["exact_match"].value == sum(right) / len(right)


def harness_task(task: InlineTask) -> Any:
    """The same task as the harness holds it, every text ready-made."""
    from lm_eval.api.task import ConfigurableTask

    generated = task.output_type == "generate_until"
    rows = [question._asdict() for question in (task.open_questions() if generated else task.questions())]

    def column(name: str) -> Callable[[Mapping[str, Any]], Any]:
        return lambda row: row[name]

    generation = None if task.generation is None else {**task.generation.model_dump(), "do_sample": False}
    return ConfigurableTask(
        config={
            "task": task.task,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": task.output_type,
            "doc_to_text": column("text"),
            "doc_to_target": column("target"),
            "target_delimiter": task.target_delimiter,
            "num_fewshot": 0,
            **({"generation_kwargs": generation | {"until": list(generation["until"])}} if generation else {}),
            **({} if generated else {"doc_to_choice": column("choices")}),
        }
    )


@harness
@pytest.mark.parametrize("pair", [False, True])
def test_a_task_of_the_job_has_the_numbers_that_the_harness_finds(pair: bool, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    model, tokenizer = model_and_tokenizer(tmp_path)
    asked: Asked = pair_of(model) if pair else ModelAlone(model)
    text = "def f(x):\n    return"
    [said] = continuations(asked, tokenizer, [tokenizer(text)["input_ids"]], most_tokens=6, on_forward=lambda: None)
    answer = said.split("\n")[0].split(" ")[0]
    docs = ({"text": text, "answer": answer or "?"}, {"text": text, "answer": "wrong"}, *OPEN_TASK.docs)
    tasks = [TASK, OPEN_TASK.model_copy(update={"docs": docs})]
    ours = measured(asked, tokenizer, *tasks)
    manager = TaskManager(include_defaults=False)
    of_harness = stage.Tasks([], manager.load([harness_task(task) for task in tasks]))
    theirs = measure_tasks(asked, tokenizer, of_harness, limit=None, seed=0, on_forward=lambda: None)
    assert ours.keys() == theirs.keys()
    for task, metrics in ours.items():
        for name, metric in metrics.items():
            assert metric.value == pytest.approx(theirs[task][name].value), (task, name)
            assert metric.stderr == pytest.approx(theirs[task][name].stderr), (task, name)


@harness
def test_the_harness_asks_a_model_as_its_own_class_for_such_models_does(tmp_path: Path) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = model_and_tokenizer(tmp_path)
    tasks = TaskManager(include_defaults=False).load([harness_task(task) for task in (TASK, OPEN_TASK)])
    ours = measure_tasks(
        ModelAlone(model), tokenizer, stage.Tasks([], tasks), limit=None, seed=0, on_forward=lambda: None
    )
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=4)
    theirs = evaluate(lm=lm, task_dict=tasks, bootstrap_iters=0, log_samples=False)["results"]
    assert ours["sums"]["acc"].value == theirs["sums"]["acc,none"]
    assert ours["sums"]["acc_norm"].value == theirs["sums"]["acc_norm,none"]
    assert ours["copies"]["exact_match"].value == theirs["copies"]["exact_match,none"]


@harness
def test_running_text_is_as_likely_as_its_windows(tmp_path: Path) -> None:
    from workers.stages.harness import AskedThrough

    model, tokenizer = model_and_tokenizer(tmp_path)
    text = "def f(x):\n    return x + 1\n" * 20
    through = AskedThrough(ModelAlone(model), Wording.of(tokenizer), [], 32)
    [found] = through.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    ids = [through.prefix_token_id, *tokenizer(text)["input_ids"]]
    assert len(ids) > 64
    expected = 0.0
    for start in range(0, len(ids) - 1, 32):
        # The last window is as long as the others, and only what is new of it counts.
        new = min(32, len(ids) - 1 - start)
        window = torch.tensor([ids[start + new - 32 : start + new + 1] if new < 32 else ids[start : start + 33]])
        with torch.no_grad():
            chances = model(input_ids=window[:, :-1]).logits.log_softmax(-1)
        expected += float(chances[0].gather(1, window[0, 1:, None])[-new:].sum())
    assert found == pytest.approx(expected, rel=1e-4)


def test_tasks_stop_between_two_forward_passes(tmp_path: Path) -> None:
    model, tokenizer = model_and_tokenizer(tmp_path)

    def stop() -> None:
        raise InterruptedError

    for asked in (ModelAlone(model), pair_of(model)):
        with pytest.raises(InterruptedError):
            measure_tasks(asked, tokenizer, load_tasks([TASK]), limit=None, seed=0, on_forward=stop)
    model(input_ids=torch.ones(1, 2, dtype=torch.long))


ARC = [
    {
        "question": f"What is {n} and {n}?",
        "choices": {"label": ["A", "B"], "text": [str(2 * n), str(n)]},
        "answerKey": "AB"[n % 2],
    }
    for n in range(1, 9)
]


@harness
def test_the_harness_s_own_tasks_are_asked_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def local(path: str, name: str, **options: object) -> DatasetDict:
        assert path == "allenai/ai2_arc"
        asked.append(name)
        return DatasetDict(dict.fromkeys(("train", "validation", "test"), Dataset.from_list(ARC)))

    monkeypatch.setattr("datasets.load_dataset", local)
    folder = write_tiny_model(tmp_path / "tiny")
    tasks = load_tasks(["ai2_arc", TASK])
    assert sorted(asked) == ["ARC-Challenge", "ARC-Easy"]
    found = measure_tasks(
        ModelAlone(load_model(folder)), load_tokenizer(folder), tasks, limit=None, seed=0, on_forward=lambda: None
    )
    assert found.keys() == {"arc_easy", "arc_challenge", "sums"}
    assert found["arc_easy"] == found["arc_challenge"]
    assert 0 <= (found["arc_easy"]["acc"].value or 0) <= 1
    with pytest.raises(InvalidRequest, match=r"arc_easy is part of evaluation.tasks\[0\] too") as overlapping:
        load_tasks([TASK.model_copy(update={"task": "arc_easy"}), "ai2_arc"])
    assert overlapping.value.param == "evaluation.tasks[1]"


@harness
@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (SimpleNamespace(UNSAFE_CODE=True), "code that the model writes"),
        (SimpleNamespace(MULTIMODAL=True), "images or sound"),
        (SimpleNamespace(_metric_fn_list={"acc": max, "rouge": None}, get_config=lambda key: None), "metric rouge is"),
        (SimpleNamespace(get_config={"generation_kwargs": {"do_sample": True}}.get), "drawn at random"),
    ],
)
def test_tasks_that_need_more_than_text_and_the_harness_are_refused(
    task: SimpleNamespace, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = SimpleNamespace(all_tasks=["odd"], load=lambda names: {"tasks": {"odd": task}, "groups": {}})
    monkeypatch.setattr("workers.stages.harness.TaskManager", lambda: manager)
    with pytest.raises(InvalidRequest, match=f"The task odd cannot be run here: .*{reason}") as refused:
        load_tasks(["odd"])
    assert refused.value.param == "evaluation.tasks[0]"


@harness
def test_names_are_looked_up_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidRequest, match="has no task 'arc_esay'") as unknown:
        load_tasks([TASK, "arc_esay"])
    assert unknown.value.param == "evaluation.tasks[1]"
    with pytest.raises(SourceUnreadable, match="arc_easy cannot be loaded") as unreadable:
        load_tasks(["arc_easy", TASK])
    assert unreadable.value.param == "evaluation.tasks[0]"


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **asked: Any) -> None:
    spec = EvaluationSpec(**asked)
    check_asked(spec, load_tasks(spec.tasks), model, tokenizer, seed=0)


LONG = "value = 1\n" * 100


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (
            TASK.model_copy(update={"docs": (*TASK.docs[:2], {**TASK.docs[2], "choices": ("1", LONG, "3")})}),
            r"Question 2 of the task sums: It has \d+ tokens, its answer \d+, but the model reads at most 128",
        ),
        (
            TASK.model_copy(update={"docs": (*TASK.docs[:2], {**TASK.docs[2], "a": LONG})}),
            r"Question 2 of the task sums: It has \d+ tokens, its answer \d+, but the model reads at most 128",
        ),
        (
            OPEN_TASK.model_copy(update={"docs": (*OPEN_TASK.docs[:2], {"text": LONG, "answer": "1"})}),
            r"Question 2 of the task copies: It has \d+ tokens, and 6 are to follow, but the model reads at most 128",
        ),
    ],
)
def test_a_question_that_the_model_cannot_read_is_named_before_the_work(
    task: InlineTask, reason: str, tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    model, tokenizer = empty_model(folder), load_tokenizer(folder)
    check(model, tokenizer, tasks=[TASK, OPEN_TASK])

    with pytest.raises(InvalidRequest, match=reason) as refused:
        check(model, tokenizer, tasks=[task])

    assert refused.value.param == "evaluation.tasks"
    check(model, tokenizer, tasks=[task], task_limit=2)  # It is not among the questions that are asked.


def test_a_prompt_that_leaves_no_room_for_what_follows_is_named_before_the_work(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    model, tokenizer = empty_model(folder), load_tokenizer(folder)
    prompt = "def f(x):\n    return x\n" * 8
    tokens = len(tokenizer(prompt)["input_ids"])
    check(model, tokenizer, prompts=["a", prompt], sample_tokens=129 - tokens)
    with pytest.raises(
        InvalidRequest, match=rf"Prompt 1: It has {tokens} tokens, and {130 - tokens} are to follow"
    ) as refused:
        check(model, tokenizer, prompts=["a", prompt], sample_tokens=130 - tokens)
    assert refused.value.param == "evaluation.prompts[1]"


def test_a_question_s_token_without_an_embedding_is_named_before_the_work(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["Sums"])

    with pytest.raises(InvalidRequest, match=r"Question 0 of the task sums: The text has the token 'Sums', .* 4096"):
        check(empty_model(folder), tokenizer, tasks=[TASK])
