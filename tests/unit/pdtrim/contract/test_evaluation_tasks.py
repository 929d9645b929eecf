"""Evaluation tasks in a job's specification: what is read, and what is refused because it could run code."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from pdtrim.contract.errors import SourceNotAllowed
from pdtrim.contract.evaluation_tasks import InlineTask
from pdtrim.contract.spec import JobSpec
from service.checking import preflight
from service.settings import Settings

YAML = """
task: sums
docs:
  - {question: "1 + 1 =", choices: ["2", "3"], answer: 0}
  - {question: "1 + 2 =", choices: ["2", "3"], answer: "3"}
doc_to_text: "Q: {{question}}"
doc_to_choice: choices
doc_to_target: answer
"""
TASK: dict[str, Any] = {
    "task": "sums",
    "docs": [
        {"question": "1 + 1 =", "choices": ["2", "3"], "answer": 0},
        {"question": "1 + 2 =", "choices": ["2", "3"], "answer": "3"},
    ],
    "doc_to_text": "Q: {{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
}


def spec(*tasks: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "model": "reference",
            "prefill": {"remove_blocks": 1},
            "decode": {"remove_blocks": 1},
            "evaluation": {"tasks": tasks},
        }
    )


def refusal(*tasks: Any) -> tuple[str, str]:
    """The field at fault and why."""
    with pytest.raises(ValidationError) as refused:
        spec(*tasks)
    error = refused.value.errors()[0]
    return error["ctx"]["param"], error["msg"]


def inline(task: Any) -> InlineTask:
    [found] = spec(task).evaluation.tasks
    assert isinstance(found, InlineTask)
    return found


def test_names_stay_names_and_yaml_text_is_the_same_task_as_an_object() -> None:
    assert spec("arc_easy", "mmlu").evaluation.tasks == ("arc_easy", "mmlu")
    assert inline(YAML) == inline(TASK)


def test_a_stored_job_has_its_tasks_back() -> None:
    made = spec("arc_easy", YAML)
    assert JobSpec.model_validate(json.loads(made.model_dump_json())) == made


def test_questions_are_filled_from_their_columns() -> None:
    assert [tuple(question) for question in inline(TASK).questions()] == [
        ("Q: 1 + 1 =", ["2", "3"], 0),
        ("Q: 1 + 2 =", ["2", "3"], 1),
    ]
    fixed = inline({**TASK, "doc_to_choice": ["{{answer}}", "no"], "doc_to_target": 1, "description": "Sums.\n"})
    assert [tuple(question) for question in fixed.questions()] == [
        ("Sums.\nQ: 1 + 1 =", ["0", "no"], 1),
        ("Sums.\nQ: 1 + 2 =", ["3", "no"], 1),
    ]


def test_a_value_that_looks_like_a_template_is_text() -> None:
    task = {**TASK, "docs": [{"question": "{{ 7 * 7 }} {% x %}", "choices": ["{{question}}", "b"], "answer": 0}]}
    assert tuple(inline(task).questions()[0]) == ("Q: {{ 7 * 7 }} {% x %}", ["{{question}}", "b"], 0)


@pytest.mark.parametrize(
    ("yaml", "reason"),
    [
        (YAML + "process_docs: !function utils.process\n", "the tag !function, which could run code"),
        (YAML + "process_docs: !!python/name:os.system\n", "the tag tag:yaml.org,2002:python/name:os.system"),
        ("!!python/object/apply:os.system ['true']: 1", "could run code"),
        ("!function a.b: 1", "could run code"),
        ("task: &a sums\ndocs: *a\n", "anchors or aliases"),
        ("a: " + "[" * 20 + "]" * 20, "nested more than 8 deep"),
        ("a: {", "cannot be read"),
        ("a: 2026-99-99", ""),
        ("{[a]: b}: c", "cannot be read"),
        ("a: " + "b" * 200_000, "at most 200000 are read"),
        ("- a: b", "InlineTask"),
    ],
)
def test_yaml_that_is_more_than_data_is_refused(yaml: str, reason: str) -> None:
    param, message = refusal("arc_easy", yaml)
    assert param.startswith("evaluation.tasks[1]")
    assert reason in message


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"process_docs": "utils.process"}, ".process_docs", "Extra inputs are not permitted"),
        ({"dataset_path": "json"}, ".dataset_path", "Extra inputs are not permitted"),
        ({"include": "/etc/passwd"}, ".include", "Extra inputs are not permitted"),
        ({"output_type": "generate_until"}, ".output_type", "multiple_choice"),
        ({"doc_to_text": "{{question.__class__}}"}, "", "templates know {{column}} alone"),
        ({"doc_to_text": "{% for a in b %}"}, "", "templates know {{column}} alone"),
        ({"doc_to_text": "{{question|upper}}"}, "", "templates know {{column}} alone"),
        ({"description": "{{question}}"}, "", "plain text, not templates"),
        ({"doc_to_text": "{{absent}}"}, "", "docs[0]: there is no column 'absent'"),
        ({"doc_to_text": ""}, "", "docs[0]: the question is empty"),
        ({"doc_to_choice": "question"}, "", "no column with a list"),
        ({"doc_to_choice": ["one"]}, "", "two choices or more"),
        ({"doc_to_target": 2}, "", "neither a choice nor the index of one"),
        ({"doc_to_target": "{{answer}}{{answer}}1"}, "", "neither a choice nor the index of one"),
        ({"docs": []}, ".docs", "at least 1 item"),
        ({"docs": [{"a b": 1}]}, ".docs", "match pattern"),
        ({"docs": [{"a": float("nan")}]}, ".docs", ""),
        ({"task": "../../etc"}, ".task", "match pattern"),
        ({"description": "\x00"}, ".description", "NUL"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused_where_it_is_wrong(
    change: dict[str, Any], field: str, reason: str
) -> None:
    param, message = refusal({**TASK, **change})
    assert param == f"evaluation.tasks[0]{field}"
    assert reason in message


@pytest.mark.parametrize("name", ["", "/etc/task.yaml", "../task", "a b", "a" * 200, "-x"])
def test_a_name_is_never_a_path(name: str) -> None:
    assert refusal(name) == (
        "evaluation.tasks[0]",
        "a task is a name of letters, digits and _ . + -, an object, or YAML text",
    )


def test_a_task_given_twice_and_too_many_tasks_are_refused() -> None:
    assert refusal("sums", YAML) == ("evaluation.tasks[1]", "the task sums is given twice")
    assert refusal(*(f"t{number}" for number in range(33))) == ("evaluation.tasks", "at most 32 tasks can be given")


@pytest.mark.parametrize("allowed", ["hf://", "hf://datasets/", "hf://datasets"])
def test_named_tasks_need_the_hub_to_be_allowed(allowed: str) -> None:
    base = ["reference", "builtin:", "hf://datasets/Salesforce", "hf://Qwen"]
    preflight.check(spec("arc_easy"), Settings(allowed_sources=[*base, allowed]))
    preflight.check(spec(TASK), Settings(allowed_sources=base))
    with pytest.raises(SourceNotAllowed) as refused:
        preflight.check(spec(TASK, "arc_easy"), Settings(allowed_sources=base))
    assert refused.value.param == "evaluation.tasks[1]"
