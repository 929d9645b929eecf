"""Estimates, frontiers, other exports, comparisons and completion, against a gateway on a real port."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pdtrim.command import app
from pdtrim.command.connection import console
from pdtrim.contract.jobs import EvaluationStage, Job, StageName, StageStatus
from pdtrim.display.comparison import figures
from service.settings import Settings
from tests.found import evaluation, model_figures, plan
from tests.gateway import model
from tests.live_gateway import LiveGateway, live

__all__ = ["model"]

Pdtrim = Callable[..., Result]


@pytest.fixture
def gateway(tmp_path: Path, model: Path) -> Iterator[LiveGateway]:
    settings = Settings(data_dir=tmp_path / "data", allowed_sources=["builtin:", model.as_uri()])
    with live(settings, model) as running:
        yield running


@pytest.fixture
def pdtrim(gateway: LiveGateway, monkeypatch: pytest.MonkeyPatch) -> Pdtrim:
    monkeypatch.setattr(console, "width", 160)  # it has read COLUMNS already
    return lambda *arguments, **more: CliRunner().invoke(app, [*arguments, "--url", gateway.url], **more)


@pytest.fixture
def searched(gateway: LiveGateway) -> str:
    job_id = gateway.played.create()
    gateway.played.store(job_id, StageName.SCORING, {})
    gateway.played.store(job_id, StageName.REMOVAL, {"plan.json": plan().model_dump_json().encode()})
    return job_id


def test_a_frontier_is_shown_and_another_export_cut_from_it(pdtrim: Pdtrim, searched: str) -> None:
    shown = pdtrim("frontier", searched).output
    assert "2, 3" in shown
    assert any("→" in line and "0.4000" in line for line in shown.splitlines())
    assert json.loads(pdtrim("frontier", searched, "--json").output)["decode"][1]["removed"] == [1, 3, 4]

    pair = pdtrim("export", searched, "--prefill", "2", "--decode", "3").output.strip()
    unified = json.loads(pdtrim("export", searched, "--unified", "1", "--json").output)

    assert json.loads(pdtrim("show", pair, "--json").output)["cut_from"] == searched
    assert f"cut from the frontier of {searched}" in pdtrim("show", pair).output
    assert [unified["spec"][half]["remove_blocks"] for half in ("prefill", "decode")] == [1, 1]
    refused = pdtrim("export", searched, "--prefill", "2", "--decode", "5")
    assert (refused.exit_code, "it has 2, 3, 4" in refused.output) == (1, True)


@pytest.mark.parametrize("counts", [[], ["--prefill", "1"], ["--prefill", "1", "--unified", "1"]])
def test_an_export_needs_both_counts_or_one_for_both(counts: list[str]) -> None:
    refused = CliRunner().invoke(app, ["export", "job_1", *counts, "--url", "http://127.0.0.1:9"])

    assert (refused.exit_code, "--unified alone" in refused.output) == (2, True)


def test_an_estimate_is_shown_with_its_warnings(gateway: LiveGateway, pdtrim: Pdtrim) -> None:
    said = json.dumps(dict(gateway.played.spec))

    shown = pdtrim("estimate", "-", input=said).output

    assert "Sets to evaluate" in shown
    assert "pdtrim-vllm" in shown
    assert json.loads(pdtrim("estimate", "-", "--json", input=said).output)["dense"]["blocks"] == 6
    refused = pdtrim("estimate", "-", input=said.replace('"remove_blocks": 2', '"remove_blocks": 60'))
    assert (refused.exit_code, "decode.remove_blocks" in refused.output) == (1, True)


def test_two_jobs_are_put_side_by_side(gateway: LiveGateway, pdtrim: Pdtrim) -> None:
    scored, other = gateway.played.create(), gateway.played.create(seed=7)
    gateway.played.store(scored, StageName.SCORING, {})

    shown = pdtrim("compare", scored, other)
    both = json.loads(pdtrim("compare", scored, other, "--json").output)

    assert "differs" in next(line for line in shown.output.splitlines() if "seed" in line)
    assert (both[scored]["seed"], both[other]["seed"]) == (0, 7)
    assert "seconds of scoring" in both[scored].keys() - both[other].keys()


def test_the_figures_of_a_job_name_what_its_evaluation_measured() -> None:
    model = model_figures(perplexity={"value": 9.5, "standard_error": 1})
    found = evaluation(models={"decode": model}, tasks={"sums": {"decode": {"acc": {"value": 0.5, "stderr": 0.1}}}})
    stage = EvaluationStage(
        name=StageName.EVALUATION, status=StageStatus.SUCCEEDED, progress=1, attempt=1, metrics=found
    )
    spec = {"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}}
    job = Job.model_validate(
        {
            "id": "job_1",
            "status": "succeeded",
            "spec": spec,
            "metadata": {},
            "stages": [stage],
            "created_at": datetime.now(UTC),
        }
    )

    shown = figures(job)

    assert shown["decode: perplexity"] == 9.5
    assert "decode: perplexity before distillation" not in shown
    named = ("PD loss, distilled", "decode: sums acc", "KV bytes, sent to decode, pruned")
    assert [shown[name] for name in named] == [3.2, 0.5, 2048]


def test_a_shell_completes_commands_and_the_ids_of_jobs(gateway: LiveGateway, searched: str) -> None:
    def completed(words: str) -> list[str]:
        """What bash is offered for the last word."""
        asked = {"_PDTRIM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return CliRunner().invoke(app, [], prog_name="pdtrim", env=asked | {"PDTRIM_URL": gateway.url}).output.split()

    assert completed("pdtrim fro") == ["frontier"]
    assert completed("pdtrim compare job_") == [searched]
