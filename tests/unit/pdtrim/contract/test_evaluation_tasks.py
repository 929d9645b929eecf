"""Evaluation tasks in a job's specification: what is read, and what is refused because it could run code."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import pytest
from pydantic import ValidationError

from pdtrim.contract.errors import InvalidRequest, SourceNotAllowed
from pdtrim.contract.evaluation_tasks import GenerationSpec, InlineTask
from pdtrim.contract.spec import EvaluationSpec, JobSpec
from pdtrim.contract.yaml_text import MAX_CHARACTERS, plain_data
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


def test_tasks_are_written_as_they_are_whatever_may_stand_in_a_column() -> None:
    docs = [{"q": "é", "c": ["x", "y"], "n": 1, "f": 1.5, "t": True}]
    given = {"task": "a", "docs": docs, "doc_to_text": "q", "doc_to_choice": "c", "doc_to_target": "n"}
    made = spec("arc_easy", given)

    written = made.model_dump(mode="json", exclude_unset=True)["evaluation"]["tasks"]
    assert written == json.loads(made.model_dump_json(exclude_unset=True))["evaluation"]["tasks"]
    assert written == ["arc_easy", given]
    assert [type(value) for value in written[1]["docs"][0].values()] == [str, list, int, float, bool]


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


OPEN_TASK: dict[str, Any] = {
    "task": "answers",
    "output_type": "generate_until",
    "docs": [{"question": "1 + 1 =", "answer": 2}, {"question": "2 + 2 =", "answer": "four"}],
    "doc_to_text": "Q: {{question}}",
    "doc_to_target": "{{answer}}!",
    "description": "Sums.\n",
}


def test_free_answers_are_filled_from_their_columns_and_end_where_the_task_says() -> None:
    task = inline(OPEN_TASK)
    assert [tuple(question) for question in task.open_questions()] == [
        ("Sums.\nQ: 1 + 1 =", "2!"),
        ("Sums.\nQ: 2 + 2 =", "four!"),
    ]
    assert task.characters == sum(len(text) + len(target) for text, target in task.open_questions())
    assert task.generation == GenerationSpec(until=("\n\n",), max_gen_toks=256)
    ending = inline({**OPEN_TASK, "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8}})
    assert ending.generation == GenerationSpec(until=("\n",), max_gen_toks=8)
    assert inline(TASK).generation is None


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"doc_to_text": "{{absent}}"}, "", "docs[0]: there is no column 'absent'"),
        ({"doc_to_target": "{{absent}}"}, "", "docs[0]: there is no column 'absent'"),
        ({"doc_to_target": ""}, "", "docs[0]: the right answer has to be a text"),
        ({"doc_to_target": "x" * 10_001}, "", "docs[0]: the right answer has to be a text"),
        ({"doc_to_text": "", "description": ""}, "", "docs[0]: the question is empty"),
        ({"generation_kwargs": {"until": [""]}}, ".generation_kwargs", "at least 1 "),
        ({"generation_kwargs": {"max_gen_toks": 5_000}}, ".generation_kwargs", "less than or equal to 4096"),
        ({"generation_kwargs": {"do_sample": True}}, ".generation_kwargs", "Extra inputs are not permitted"),
    ],
)
def test_a_free_answer_that_cannot_be_asked_for_is_refused(change: dict[str, Any], field: str, reason: str) -> None:
    param, message = refusal({**OPEN_TASK, **change})
    assert param == f"evaluation.tasks[0]{field}"
    assert reason in message


@pytest.mark.parametrize(
    ("evaluation", "param"),
    [
        (
            {"tasks": [TASK, {**OPEN_TASK, "generation_kwargs": {"max_gen_toks": 513}}]},
            "evaluation.tasks[1].generation_kwargs.max_gen_toks",
        ),
        ({"prompts": ["a"], "sample_tokens": 300}, "evaluation.sample_tokens"),
    ],
)
def test_answers_that_no_context_holds_are_refused_when_the_job_is_made(evaluation: dict[str, Any], param: str) -> None:
    made = spec().model_copy(update={"evaluation": EvaluationSpec.model_validate(evaluation)})
    config = {**preflight.check(spec(), Settings()).config, "max_position_embeddings": 280}
    with pytest.raises(InvalidRequest, match="generated after a prompt, but the model reads at most 280") as refused:
        preflight.check_config(made, config)
    assert refused.value.param == param


def test_a_value_that_looks_like_a_template_is_text() -> None:
    task = {**TASK, "docs": [{"question": "{{ 7 * 7 }} {% x %}", "choices": ["{{question}}", "b"], "answer": 0}]}
    assert tuple(inline(task).questions()[0]) == ("Q: {{ 7 * 7 }} {% x %}", ["{{question}}", "b"], 0)


@pytest.mark.parametrize(
    ("yaml", "reason"),
    [
        (YAML + "process_docs: !function utils.process\n", "the tag !function; tags could run code"),
        (YAML + "process_docs: !!python/name:os.system\n", "the tag tag:yaml.org,2002:python/name:os.system"),
        ("!!python/object/apply:os.system ['true']: 1", "could run code"),
        ("!function a.b: 1", "could run code"),
        ("task: &a sums\ndocs: *a\n", "anchors or aliases"),
        ("a: " + "[" * 20 + "]" * 20, "nested more than 8 deep"),
        ("a: {", "cannot be read"),
        ("a: 2026-99-99", ""),
        ("a: !!float ''", "tags could run code"),
        ("a: !!bool x", "tags could run code"),
        ("a: !!int ''", "tags could run code"),
        ('a: "\\U00110000"', "cannot be read"),
        ('a: "\\UFFFFFFFF"', "cannot be read"),
        ("a: 1" + ":59" * 20_000, ""),
        ("a: " + "9" * 5_000, "a number of 5000 digits"),
        ("a: \ud800", "cannot be read"),
        ("{[a]: b}: c", "a key that is no text"),
        ("1: b", "a key that is no text"),
        ("a: b\na: c", "has the key 'a' twice"),
        ("a: b\n---\na: b", "more than one document"),
        ("a: " + "b" * 200_000, "at most 200000 are read"),
        ("- a: b", "InlineTask"),
    ],
)
def test_yaml_that_is_more_than_data_is_refused(yaml: str, reason: str) -> None:
    param, message = refusal("arc_easy", yaml)
    assert param.startswith("evaluation.tasks[1]")
    assert reason in message


def test_the_yaml_texts_of_a_job_are_bounded_together() -> None:
    task = YAML + "#" * (MAX_CHARACTERS // 2)
    param, message = refusal(task, task)
    assert param == "evaluation.tasks[1]"
    assert "at most 200000 are read" in message


def test_yaml_text_is_read_by_the_core_schema() -> None:
    text = (
        "{a: 1, b: -2.5e1, c: .5, d: true, e: , f: ~, g: '1', h: yes, i: 1:30, j: 0x1f, k: [a, {b: c}], l: 2026-01-01}"
    )

    assert plain_data(text) == {
        **{"a": 1, "b": -25.0, "c": 0.5, "d": True, "e": None, "f": None, "g": "1", "h": "yes", "i": "1:30"},
        **{"j": "0x1f", "k": ["a", {"b": "c"}], "l": "2026-01-01"},
    }
    assert plain_data("a: |\n  12\n") == {"a": "12\n"}


@pytest.mark.parametrize(
    "text",
    [
        YAML.replace("docs:", "docs:\n" + '  - {question: "1 + 1 =", choices: ["2", "3"], answer: 0}\n' * 3_000),
        "a: [" + "[]," * 60_000 + "]",
        "a: " + "b " * 90_000,
        "a:\n" + "".join(f" k{number}: v\n" for number in range(15_000)),
        'a: "' + "\\u00e9" * 30_000 + '"',
    ],
)
def test_as_much_yaml_as_is_read_takes_a_fraction_of_a_second(text: str) -> None:
    assert 50_000 < len(text) <= MAX_CHARACTERS
    started = time.process_time()
    plain_data(text)

    assert time.process_time() - started < 1.5  # It took 2 to 5 s with PyYAML's own loader.


LONG: dict[str, Any] = {
    **TASK,
    "docs": [{"question": "x" * 10_000, "choices": ["2", "3"], "answer": 0}] * 10,
    "doc_to_text": "{{question}}" * 8_000,
}


@pytest.mark.parametrize(
    "task",
    [
        LONG,
        {**LONG, "doc_to_text": "question", "doc_to_choice": ["{{question}}" * 1_000, "b"]},
        {**LONG, "doc_to_text": "question", "description": "x" * 100_000, "docs": LONG["docs"] * 40},
        {**LONG, "doc_to_text": "question", "target_delimiter": "x" * 100_000, "docs": LONG["docs"] * 40},
        {**LONG, "doc_to_text": "question", "docs": [{**LONG["docs"][0], "choices": ["a"] * 7_000}]},
    ],
)
def test_a_task_that_would_ask_too_much_is_refused_without_rendering_it(task: dict[str, Any]) -> None:
    tracemalloc.start()
    _, message = refusal(task)
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert "characters of the model; at most 64000000 are asked" in message
    assert most_bytes < 10_000_000


def test_several_tasks_are_bounded_together() -> None:
    half = {**LONG, "doc_to_text": "{{question}}" * 200}
    spec({**half, "task": "one"})
    assert refusal({**half, "task": "one"}, {**half, "task": "two"})[0] == "evaluation.tasks"


@pytest.mark.parametrize(
    "task",
    [
        TASK,
        {**TASK, "doc_to_choice": ["{{answer}}", "{{question}}!"], "doc_to_target": 1, "description": "Sums."},
        {**TASK, "doc_to_text": "question", "target_delimiter": "", "docs": [{**TASK["docs"][0], "question": 1.5}]},
    ],
)
def test_characters_are_those_of_the_questions(task: dict[str, Any]) -> None:
    made = inline(task)

    assert made.characters == sum(
        len(choice) + len(made.target_delimiter) + len(text)
        for text, choices, _ in made.questions()
        for choice in choices
    )


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"process_docs": "utils.process"}, ".process_docs", "Extra inputs are not permitted"),
        ({"dataset_path": "json"}, ".dataset_path", "Extra inputs are not permitted"),
        ({"include": "/etc/passwd"}, ".include", "Extra inputs are not permitted"),
        ({"output_type": "loglikelihood"}, ".output_type", "multiple_choice"),
        ({"output_type": "generate_until"}, "", "its answers are free text"),
        ({"doc_to_choice": None}, "", "needs `doc_to_choice`"),
        ({"generation_kwargs": {"until": ["x"]}}, "", "no answer is generated here"),
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
