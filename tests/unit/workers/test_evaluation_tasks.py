"""Evaluation tasks on real, tiny models; those that run the harness are left out where it is not installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from service.contract.errors import ExtraNotInstalled, InvalidRequest, SourceUnreadable
from service.contract.tasks import InlineTask
from tests.tiny_job import write_tiny_model
from workers.models import load_model, load_tokenizer
from workers.stages import tasks as stage
from workers.stages.tasks import load_tasks, measure_tasks

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
    with pytest.raises(ExtraNotInstalled, match=r"pip install 'pdtrim-service\[eval\]'") as missing:
        load_tasks([TASK])
    assert missing.value.param == "evaluation.tasks"


@harness
def test_the_harness_finds_the_choice_that_the_model_finds_likeliest(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    calls = []
    found = measure_tasks(
        model, tokenizer, load_tasks([TASK]), limit=None, seed=0, on_forward=lambda: calls.append(None)
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
    assert found["sums"]["acc"]["value"] == sum(right) / len(right)
    assert found["sums"]["acc"]["stderr"] == pytest.approx(float(torch.tensor(right).float().std()) / len(right) ** 0.5)
    assert found["sums"].keys() == {"acc", "acc_norm"}
    assert calls
    first = measure_tasks(model, tokenizer, load_tasks([TASK]), limit=5, seed=0, on_forward=lambda: None)
    assert first["sums"]["acc"]["value"] == sum(right[:5]) / 5


@harness
def test_tasks_stop_between_two_forward_passes(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    model = load_model(folder)

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        measure_tasks(model, load_tokenizer(folder), load_tasks([TASK]), limit=None, seed=0, on_forward=stop)
    model(input_ids=torch.ones(1, 2, dtype=torch.long))


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
