"""Jobs on conversations, on what the dense model answers itself, and on less than they ask for."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load

from pdtrim.contract.jobs import StageName, StageStatus
from pdtrim.contract.results import DistillationResult, EvaluationResult, ScoringResult
from pdtrim.contract.spec import JobSpec
from pdtrim.display.jobs import job_page
from service.db import artifacts, jobs, stages, views
from service.db.session import connect, migrate, transaction
from service.db.tables import StageRow
from service.settings import Settings
from service.storage import open_store
from tests.running import run_stage
from tests.stored_jobs import store_job
from tests.tiny_job import tiny_spec, write_tiny_model
from tests.unit.workers.pruning.models import loaded_whole
from workers.pruning.model.blocks import drop_blocks
from workers.running import attempt as pipeline
from workers.running.attempt import Worker

pytestmark = pytest.mark.training

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    settings = Settings(
        data_dir=tmp_path / "data", allowed_sources=["builtin:", (tmp_path / "models").as_uri()], lease_seconds=5
    )
    database = connect(settings.database_url)
    migrate(database)
    return Worker(settings, database, open_store(settings.artifacts_url), name="test")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_tiny_model(tmp_path / "models" / "tiny")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def create(worker: Worker, spec: dict[str, Any]) -> str:
    with transaction(worker.database) as session:
        return store_job(session, JobSpec.model_validate(spec)).id


def run_until(worker: Worker, job_id: str, last: StageName) -> None:
    for stage in list(StageName)[: list(StageName).index(last) + 1]:
        run_stage(worker, job_id, stage)
        assert stage_row(worker, job_id, stage).status == StageStatus.SUCCEEDED, stage_row(worker, job_id, stage).error


def stage_row(worker: Worker, job_id: str, stage: StageName) -> StageRow:
    with transaction(worker.database) as session:
        return session.get_one(StageRow, (job_id, stage))


def digests(worker: Worker, job_id: str, stage: StageName) -> dict[str, str]:
    with transaction(worker.database) as session:
        return {row.name: row.sha256 for row in artifacts.of_stage(session, job_id, stage)}


def content(worker: Worker, job_id: str, stage: StageName, name: str) -> bytes:
    with transaction(worker.database) as session:
        (key,) = [row.key for row in artifacts.of_stage(session, job_id, stage) if row.name == name]
    return worker.store.get_bytes(key)


def chat(folder: Path, rows: int, *, answered: bool) -> dict[str, str]:
    """A data set of so many conversations."""
    path = folder / "chat.jsonl"
    with path.open("w") as file:
        for number in range(rows):
            messages = [{"role": "user", "content": f"What is {number} + 1?"}]
            messages += [{"role": "assistant", "content": f"{number} + 1 = {number + 1}"}] * answered
            file.write(json.dumps({"messages": messages}) + "\n")
    return {"source": path.as_uri()}


def test_the_loss_of_healing_falls_on_answers(worker: Worker, model: Path) -> None:
    halves = {half: {"remove_blocks": 2} for half in ("prefill", "decode")}
    spec = tiny_spec(model, data=chat(model.parent, 400, answered=True), **halves)
    spec["distillation"] |= {"losses": {"kl": 0, "label": 1, "hidden": 0}}
    job_id = create(worker, spec)
    run_until(worker, job_id, StageName.EVALUATION)

    windows = load(content(worker, job_id, StageName.SCORING, "windows.safetensors"))
    held_out, counted = windows["calibration"], windows["answers.calibration"][:, 1:]
    plan = stage_row(worker, job_id, StageName.REMOVAL).metrics["prefill"]
    pruned = drop_blocks(loaded_whole(model), [*plan["deleted"], *map(int, plan["distilled"])])
    with torch.no_grad():
        nll = F.cross_entropy(pruned(input_ids=held_out).logits[:, :-1].mT, held_out[:, 1:], reduction="none")
    expected = sum(float(row[chosen].mean()) for row, chosen in zip(nll, counted, strict=True)) / len(nll)
    result = DistillationResult.model_validate(stage_row(worker, job_id, StageName.DISTILLATION).metrics)
    assert result.prefill is not None
    assert result.prefill.before == pytest.approx(expected, rel=1e-4)
    assert result.answers is None


@pytest.mark.parametrize("kind", ["conversations", "text", "the standard library"])
def test_healing_trains_on_what_the_dense_model_answers(kind: str, worker: Worker, model: Path) -> None:
    data = {
        "conversations": chat(model.parent, 400, answered=False),
        "text": tiny_spec(model)["data"],
        "the standard library": {},
    }[kind]
    spec = tiny_spec(model, data=data, calibration={"windows": 4, "window_tokens": 64})
    spec["distillation"]["data"] = "self"
    job_id = create(worker, spec)
    run_until(worker, job_id, StageName.EVALUATION)

    rows = [
        json.loads(line)
        for line in content(worker, job_id, StageName.DISTILLATION, "answers.jsonl").decode().splitlines()
    ]
    result = DistillationResult.model_validate(stage_row(worker, job_id, StageName.DISTILLATION).metrics)
    assert result.answers is not None
    assert result.answers.answers == len(rows) >= 32
    assert result.answers.tokens > 0
    assert result.prefill is not None
    assert result.prefill.steps > 0
    if kind == "conversations":
        assert all(row["prompt"].startswith("<user>What is ") for row in rows)
        assert all(row["prompt"].endswith("?<|endoftext|>\n<assistant>") for row in rows)


def test_answers_that_were_given_before_an_interruption_are_not_given_again(worker: Worker, model: Path) -> None:
    windows = {"windows": 4, "window_tokens": 64}
    spec = tiny_spec(model, data=chat(model.parent, 400, answered=False), calibration=windows)
    spec["distillation"] |= {"data": "self", "heal_tokens": 4096}
    unbroken, broken = (create(worker, spec) for _ in range(2))
    run_until(worker, unbroken, StageName.DISTILLATION)
    run_until(worker, broken, StageName.REMOVAL)
    with transaction(worker.database) as session:
        claim = stages.claim(session, broken, StageName.DISTILLATION, worker="dying", lease_seconds=0.0)
    assert claim is not None
    folder = f"jobs/{broken}/distillation/state"

    def die_after_two_batches() -> None:
        if len(list(worker.store.list_keys(folder))) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline._execute(worker, claim, die_after_two_batches)
    assert len(list(worker.store.list_keys(folder))) == 2
    with transaction(worker.database) as session:
        stages.retire(session, broken, StageName.DISTILLATION, max_attempts=5)
    run_stage(worker, broken, StageName.DISTILLATION)

    assert digests(worker, broken, StageName.DISTILLATION) == digests(worker, unbroken, StageName.DISTILLATION)


def test_less_than_was_asked_for_is_told_wherever_the_job_is_shown(worker: Worker, model: Path) -> None:
    text = "".join(f"value_{i} = {i} * {i + 1}\n" for i in range(60))
    spec = tiny_spec(model, data={"text": text}, calibration={"windows": 40, "window_tokens": 32})
    job_id = create(worker, {**spec, "distillation": {**spec["distillation"], "heal_tokens": 4096}})
    run_until(worker, job_id, StageName.EVALUATION)

    found = ScoringResult.model_validate(stage_row(worker, job_id, StageName.SCORING).metrics)
    assert found.warnings[0] == f"The data has {found.windows.calibration} windows for calibration; 40 were asked for."
    assert found.warnings[1].startswith(f"The data has {found.windows.train * 32:,} tokens for training; 4,096 were")
    page = content(worker, job_id, StageName.EVALUATION, "report.html").decode()
    assert found.warnings[0] in page
    with transaction(worker.database) as session:
        shown = views.job(jobs.get(session, job_id), jobs.stages(session, [job_id])[job_id])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(job_page(shown))
    assert f"! {found.warnings[0]}" in console.export_text()


def test_one_window_has_no_standard_error(worker: Worker, model: Path) -> None:
    job_id = create(worker, tiny_spec(model, evaluation={"windows": 1, "speed_tokens": 2, "speed_repeats": 1}))
    run_until(worker, job_id, StageName.EVALUATION)
    found = EvaluationResult.model_validate(stage_row(worker, job_id, StageName.EVALUATION).metrics)
    assert {of_model.perplexity.standard_error for of_model in found.models.values()} == {None}
