"""What a job found is said in the same words on terminal, dashboard, report and model card."""

from __future__ import annotations

import html
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from pdtrim.contract.jobs import Job, StageName
from pdtrim.contract.results import BlockScores, ScoringResult, SearchRecord
from pdtrim.display import captions
from pdtrim.display.jobs import job_page
from pdtrim.display.tables import Table, bound_lines, controls_table, evaluation_tables
from pdtrim.display.verdict import verdict
from service.db import stages
from service.db.session import transaction
from service.settings import Settings
from tests.found import RESULTS, evaluation, model_figures, pair_figures, plan, removal, token_rule_figures
from tests.gateway import Gateway, serve, write_model
from workers.reporting.card import model_card
from workers.reporting.figures import draw_all
from workers.reporting.findings import Findings
from workers.reporting.page import render

pytestmark = pytest.mark.slow

BOUND = {
    "max_perplexity_increase": 0.1,
    "perplexity_increase": 0.2,
    "met": False,
    "dense_perplexity": 20.0,
    "frontier": [],
}
REMOVAL = removal(bounds={"decode": BOUND})
EVALUATION = evaluation(
    models={
        "dense": model_figures(mlp_channels=48, peak_memory_bytes=5 << 20),
        "prefill": model_figures(blocks=5, mlp_channels=48, deleted_blocks=[2], kl_to_dense=0.0625),
        "decode": model_figures(blocks=3, mlp_channels=24, distilled_blocks={3: 1}, time_to_first_token_ms=20.0),
    },
    pair=pair_figures(kv_tokens=token_rule_figures(ratio_asked=9.0, ratio_reached=False)),
    tasks={"sums": {name: {"acc": {"value": 0.5, "stderr": 0.125}} for name in ("dense", "prefill", "decode")}},
)
SEARCHED = [controls_table(REMOVAL)]
EVALUATED = evaluation_tables(EVALUATION)


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    folder = write_model(tmp_path / "models" / "tiny")
    with serve(Settings(data_dir=tmp_path / "data", allowed_sources=["builtin:", folder.as_uri()]), folder) as running:
        yield running


def words(tables: list[Table]) -> list[str]:
    """Every title and every cell."""
    return [text for one in tables for text in (one.title, *one.columns, *(c for row in one.rows for c in row)) if text]


def on_the_dashboard(gateway: Gateway) -> tuple[Job, str]:
    job_id = gateway.create(decode={"remove_blocks": 3})
    found = RESULTS | {StageName.REMOVAL: REMOVAL, StageName.EVALUATION: EVALUATION}
    for stage in StageName:
        held = gateway.claim(job_id, stage)
        with transaction(gateway.database) as session:
            metrics = found[stage].model_dump(mode="json")
            stages.complete(session, held, artifacts=[], metrics=metrics, versions={})
    job = Job.model_validate(gateway.client.get(f"/v1/jobs/{job_id}").json())
    return job, html.unescape(gateway.client.get(f"/ui/jobs/{job_id}").text)


def in_the_report(job: Job) -> Findings:
    scored = job.result(ScoringResult)
    assert scored is not None
    decided = plan(prefill=REMOVAL.prefill, decode=REMOVAL.decode, losses=REMOVAL.losses, bounds=REMOVAL.bounds)
    return Findings(
        job_id=job.id,
        spec=job.spec,
        model_revision=None,
        scores=BlockScores(cosine=scored.cosine, merge_errors=[]),
        plan=decided,
        search=SearchRecord(prefill=[], decode=[]),
        evaluation=EVALUATION,
        versions={},
    )


def on_a_terminal(job: Job) -> str:
    shown = io.StringIO()
    Console(file=shown, width=200).print(job_page(job))
    return shown.getvalue()


def test_tables_and_bounds_are_the_same_wherever_they_are_shown(gateway: Gateway) -> None:
    job, dashboard = on_the_dashboard(gateway)
    findings = in_the_report(job)
    drawings = list(draw_all(findings))
    report = html.unescape(render(findings, drawings))
    card = model_card(
        {
            "role": "decode",
            "source": {"uri": "reference", "revision": None},
            "num_source_blocks": 6,
            "kept_blocks": [0, 1, 5],
            "distilled_blocks": {"3": 1},
        },
        {},
        findings.evaluation_tables(),
    )

    said = verdict(EVALUATION, bounds=REMOVAL.bounds)
    facts = [text for fact in (*said.saved, *said.costs) for text in (fact.name, fact.value, fact.beside)]
    for text in [said.sentence, *facts]:
        for place, page in (("terminal", on_a_terminal(job)), ("dashboard", dashboard), ("report", report)):
            assert text in page, (text, place)
    for text in [*words(SEARCHED), *bound_lines(REMOVAL), *words(EVALUATED)]:
        for place, page in (("terminal", on_a_terminal(job)), ("dashboard", dashboard), ("report", report)):
            assert text in page, (text, place)
    for text in words(EVALUATED):
        assert text in card, text


def test_figures_have_one_title_and_one_explanation_on_dashboard_and_report(gateway: Gateway) -> None:
    job, dashboard = on_the_dashboard(gateway)
    findings = in_the_report(job)
    report = html.unescape(render(findings, draw_all(findings)))

    for caption in (captions.SCORES, captions.CONTROLS, captions.KV_BYTES):
        for text in (caption.title, caption.text):
            assert text in dashboard, text
            assert text in report, text
    assert captions.BLOCK_MAP.title in dashboard
    assert captions.BLOCK_MAP.title in report
