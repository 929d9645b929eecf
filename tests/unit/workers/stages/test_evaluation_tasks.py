"""Evaluation tasks on real, tiny models; those that run the harness are left out where it is not installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict

from pdtrim.contract.errors import ExtraNotInstalled, InvalidRequest, SourceUnreadable
from pdtrim.contract.evaluation_tasks import InlineTask
from tests.tiny_job import write_tiny_model
from tests.unit.workers.pruning.models import framed_tokenizer
from workers.inputs.models import load_model, load_tokenizer
from workers.stages import evaluation_tasks as stage
from workers.stages.evaluation_tasks import check_tasks, load_tasks, measure_tasks

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


def test_without_tasks_the_harness_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "find_spec", lambda name: None)
    assert load_tasks([]) is None
    with pytest.raises(ExtraNotInstalled, match=r"pip install 'pdtrim\[eval\]'") as missing:
        load_tasks([TASK])
    assert missing.value.param == "evaluation.tasks"


@harness
@pytest.mark.parametrize(("opening", "closing"), [((), ()), ((5,), ()), ((5,), (6,))])
def test_the_harness_finds_the_choice_that_the_model_finds_likeliest(
    opening: tuple[int, ...], closing: tuple[int, ...], tmp_path: Path
) -> None:
    model, tokenizer = load_model(write_tiny_model(tmp_path / "tiny")), framed_tokenizer(opening)
    calls: list[None] = []
    found = measure_tasks(
        model,
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
    first = measure_tasks(model, tokenizer, load_tasks([TASK]), limit=5, seed=0, on_forward=lambda: None)
    assert first["sums"]["acc"].value == sum(right[:5]) / 5


@harness
def test_tasks_stop_between_two_forward_passes(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    model = load_model(folder)

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        measure_tasks(model, load_tokenizer(folder), load_tasks([TASK]), limit=None, seed=0, on_forward=stop)
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
        load_model(folder), load_tokenizer(folder), tasks, limit=None, seed=0, on_forward=lambda: None
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
    ],
)
def test_tasks_that_need_more_than_text_and_the_harness_are_refused(
    task: SimpleNamespace, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = SimpleNamespace(all_tasks=["odd"], load=lambda names: {"tasks": {"odd": task}, "groups": {}})
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **options: manager)
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


@harness
def test_an_answer_that_the_model_cannot_read_is_named_before_the_work(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    check_tasks(load_tasks([TASK]), model, tokenizer, limit=None, seed=0)
    long = [*TASK.docs[:2], {**TASK.docs[2], "choices": ("1", "value = 1\n" * 100, "3")}]
    tasks = load_tasks([TASK.model_copy(update={"docs": tuple(long)})])

    with pytest.raises(
        InvalidRequest, match=r"Question 2 of the task sums: An answer has \d+ tokens.* at most 128"
    ) as refused:
        check_tasks(tasks, model, tokenizer, limit=None, seed=0)

    assert refused.value.param == "evaluation.tasks"
    check_tasks(tasks, model, tokenizer, limit=2, seed=0)  # It is not among the questions that are asked.


@harness
def test_a_question_s_token_without_an_embedding_is_named_before_the_work(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    tokenizer.add_tokens(["Sums"])

    with pytest.raises(InvalidRequest, match=r"Question 0 of the task sums: The text has the token 'Sums', .* 4096"):
        check_tasks(load_tasks([TASK]), model, tokenizer, limit=None, seed=0)
