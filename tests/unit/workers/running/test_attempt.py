"""Stages of real, tiny jobs, run in this process on SQLite and a local store."""

from __future__ import annotations

import gc
import hashlib
import html
import io
import json
import re
import shutil
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load, load_file, save_file
from sqlalchemy.exc import OperationalError
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    ModernBertDecoderConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
    Starcoder2Config,
)

from benchmarks.tiny_whole_models import decoder_blocks, logits, passing, question, reloaded_whole, whole_model
from pdtrim.contract.jobs import JobStatus, StageName, StageStatus
from pdtrim.contract.results import EvaluatedSet, HalfPlan, Result, SearchRecord
from pdtrim.contract.spec import JobSpec
from pdtrim.display.jobs import job_page
from service.db import artifacts, events, jobs, stages, views
from service.db.session import connect, migrate, transaction
from service.db.tables import ArtifactRow, StageRow, now
from service.settings import Settings
from service.storage import StoreRefused, open_store
from tests.found import RESULTS
from tests.running import run_stage
from tests.stored_jobs import store_job
from tests.tiny_job import REFERENCE, tiny_spec, write_tiny_model
from tests.unit.workers.pruning.models import framed_tokenizer, loaded_whole
from workers.pruning.model.blocks import block_stack, drop_blocks
from workers.pruning.model.width import channel_scores, kept_channels
from workers.pruning.search.perplexity_bound import PerplexityBound
from workers.pruning.serving.pair_server import PrefillDecodePair
from workers.reporting.figures import PLOTS, Drawing, draw_all
from workers.running import attempt as pipeline
from workers.running.attempt import Worker
from workers.stages import STAGES, evaluation
from workers.stages.context import StageContext

pytestmark = pytest.mark.training


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    settings = Settings(
        data_dir=tmp_path / "data",
        allowed_sources=["builtin:", (tmp_path / "models").as_uri()],
        lease_seconds=5,
        retry_seconds=0.2,
    )
    database = connect(settings.database_url)
    migrate(database)
    return Worker(settings, database, open_store(settings.artifacts_url), name="test")


@pytest.fixture(autouse=True)
def _empty_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """To draw takes as long as all else of a tiny job. Who looks at figures draws them again."""
    empty = [Drawing(plot.name, plot.caption.title, plot.caption.text, alt="", png=b"", svg="<svg/>") for plot in PLOTS]
    monkeypatch.setattr(evaluation, "draw_all", lambda findings: iter(empty))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "models" / "tiny")


def create(worker: Worker, spec: dict[str, Any]) -> str:
    with transaction(worker.database) as session:
        return store_job(session, JobSpec.model_validate(spec)).id


def retire(worker: Worker, job_id: str, stage: StageName) -> None:
    with transaction(worker.database) as session:
        stages.retire(session, job_id, stage, max_attempts=5)


def run_through(worker: Worker, job_id: str, last: StageName = StageName.EVALUATION) -> None:
    for stage in StageName:
        run_stage(worker, job_id, stage)
        assert stage_row(worker, job_id, stage).status == StageStatus.SUCCEEDED, stage_row(worker, job_id, stage).error
        if stage == last:
            return


def stage_row(worker: Worker, job_id: str, stage: StageName) -> StageRow:
    with transaction(worker.database) as session:
        return session.get_one(StageRow, (job_id, stage))


def job_error(worker: Worker, job_id: str) -> dict[str, Any]:
    with transaction(worker.database) as session:
        job = jobs.get(session, job_id)
        assert job.status == JobStatus.FAILED
        assert job.error is not None
        return job.error


def recorded(worker: Worker, job_id: str, stage: StageName) -> dict[str, ArtifactRow]:
    with transaction(worker.database) as session:
        return {row.name: row for row in artifacts.of_stage(session, job_id, stage)}


def content(worker: Worker, job_id: str, stage: StageName, name: str) -> bytes:
    return worker.store.get_bytes(recorded(worker, job_id, stage)[name].key)


def event_types(worker: Worker, job_id: str) -> list[str]:
    with transaction(worker.database) as session:
        return [row.type for row in events.page(session, job_id, after=0, limit=1000)[0]]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_ends_with_both_checkpoints_every_artifact_recorded_and_no_scratch_left(
    worker: Worker, model: Path
) -> None:
    job_id = create(worker, tiny_spec(model))
    run_through(worker, job_id)

    with transaction(worker.database) as session:
        job = jobs.get(session, job_id)
    assert job.status == JobStatus.SUCCEEDED
    assert {"torch", "transformers", "pdtrim"} <= job.versions.keys()
    exported = recorded(worker, job_id, StageName.EXPORT)
    for role in ("prefill", "decode"):
        for name in ("config.json", "model.safetensors", "pdtrim.json", "tokenizer.json", "README.md"):
            assert f"{role}/{name}" in exported
    for stage in StageName:
        for row in recorded(worker, job_id, stage).values():
            data = worker.store.get_bytes(row.key)
            assert (len(data), hashlib.sha256(data).hexdigest()) == (row.size, row.sha256)
    assert worker.settings.scratch_dir is not None
    assert not list((worker.settings.scratch_dir / "jobs").iterdir())


def test_the_report_compares_dense_pruned_and_distilled(
    worker: Worker, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "draw_all", draw_all)
    job_id = create(worker, tiny_spec(model))
    run_through(worker, job_id)
    report = stage_row(worker, job_id, StageName.EVALUATION).metrics
    assert json.loads(content(worker, job_id, StageName.EVALUATION, "report.json")) == report
    models, pair = report["models"], report["pair"]
    assert [models[name]["blocks"] for name in ("dense", "prefill", "decode")] == [5, 4, 3]
    assert models["dense"]["parameters"] > models["prefill"]["parameters"] > models["decode"]["parameters"]
    # 2 (K and V) · layers · 2 KV heads · head dimension 8 · 32 tokens · 4 bytes
    assert pair["kv_bytes_per_request"]["dense"] == 2 * 5 * 2 * 8 * 32 * 4
    assert pair["kv_bytes_per_request"]["sent"] == 2 * 3 * 2 * 8 * 15 * 4  # The prompt's last token is decode's own.
    assert len(pair["kv_layer_map"]) == 3
    assert [models["dense"][key] for key in ("kl_to_dense", "top1_agreement", "peak_memory_bytes")] == [0.0, 1.0, None]
    assert models["decode"]["kl_to_dense"] > 0
    assert models["decode"]["top1_agreement"] < 1
    assert all(models[name]["time_to_first_token_ms"] > 0 for name in models)
    assert all(models[name]["undistilled_perplexity"] for name in ("prefill", "decode"))
    left = recorded(worker, job_id, StageName.EVALUATION)
    assert all(left[f"figures/{plot.name}.png"].size for plot in PLOTS)
    shown = f"{models['decode']['perplexity']['value']:.2f} ± "
    for name in ("report.html", "prefill/README.md", "decode/README.md"):
        assert shown in content(worker, job_id, StageName.EVALUATION, name).decode()
    assert shown not in content(worker, job_id, StageName.EXPORT, "decode/README.md").decode()


def test_removing_nothing_keeps_every_loss_and_every_bit_of_the_dense_model(worker: Worker, model: Path) -> None:
    nothing = {"prefill": {"remove_blocks": 0}, "decode": {"remove_blocks": 0}}
    job_id = create(worker, tiny_spec(model, **nothing))
    run_through(worker, job_id)
    report = stage_row(worker, job_id, StageName.EVALUATION).metrics
    assert report["models"]["unified"]["perplexity"] == report["models"]["dense"]["perplexity"]
    assert report["pair"]["distilled_loss"] == pytest.approx(report["pair"]["dense_loss"], abs=1e-5)
    losses = stage_row(worker, job_id, StageName.REMOVAL).metrics["losses"]
    assert losses["prefill"] == pytest.approx(0, abs=1e-5)
    assert losses["decode"] == pytest.approx(0, abs=1e-5)
    exported = content(worker, job_id, StageName.EXPORT, "unified/model.safetensors")
    assert len(exported) == pytest.approx((model / "model.safetensors").stat().st_size, rel=0.01)


def test_equal_counts_give_one_unified_checkpoint(worker: Worker, model: Path) -> None:
    job_id = create(worker, tiny_spec(model, prefill={"remove_blocks": 2}))
    run_through(worker, job_id, StageName.EXPORT)
    names = recorded(worker, job_id, StageName.EXPORT)
    assert {name.split("/")[0] for name in names} == {"unified"}
    plan = json.loads(content(worker, job_id, StageName.REMOVAL, "plan.json"))
    assert plan["prefill"] == plan["decode"]


@pytest.mark.parametrize(
    ("prefill_removes", "asked", "sent_tokens", "reached"),
    [
        (1, {"ratio": 4}, 20, True),  # of the dense model's 5 · 16 prompt tokens
        (1, {"ratio": 1000}, 3, False),
        (1, {"attention": {"threshold": 1e-6, "first": 2, "last": 3}}, 15, None),
        (2, {"ratio": 4}, 18, True),
    ],
)
def test_a_kv_token_rule_is_chosen_exported_and_measured(
    prefill_removes: int,
    asked: dict[str, Any],
    sent_tokens: int,
    reached: bool | None,
    worker: Worker,
    model: Path,
    tmp_path: Path,
) -> None:
    quick = {"prefill": {"remove_blocks": prefill_removes}, "distillation": {"enabled": False}}
    job_id = create(worker, tiny_spec(model, kv_tokens=asked, **quick))
    run_through(worker, job_id)

    pair = stage_row(worker, job_id, StageName.EVALUATION).metrics["pair"]
    measured = pair["kv_tokens"]
    rule = measured["rule"]
    roles = {name.split("/")[0] for name in recorded(worker, job_id, StageName.EXPORT)}
    for name, row in recorded(worker, job_id, StageName.EXPORT).items():
        (tmp_path / "served" / name).parent.mkdir(parents=True, exist_ok=True)
        worker.store.download(row.key, tmp_path / "served" / name)
    for role in roles:
        assert json.loads((tmp_path / "served" / role / "pdtrim.json").read_text())["kv_tokens"] == rule
        card = (tmp_path / "served" / role / "README.md").read_text()
        assert "are sent the keys and values" in card
        assert "Decode runs the prompt's last token itself" in card
    served = PrefillDecodePair.load(*(tmp_path / "served" / role for role in (max(roles), min(roles))))
    windows = load(content(worker, job_id, StageName.SCORING, "windows.safetensors"))["validation"]
    handover = served.prefill(windows[:1, :16])
    assert measured["bytes_sent"] == handover.nbytes <= 2 * 2 * 8 * 4 * sent_tokens
    assert measured["ratio"] == pair["kv_bytes_per_request"]["dense_sent"] / handover.nbytes
    assert (measured["ratio_asked"], measured["ratio_reached"]) == (asked.get("ratio"), reached)
    assert measured["loss"] != pytest.approx(pair["distilled_loss"], abs=1e-6)


def test_without_kv_tokens_every_token_is_sent(worker: Worker, model: Path) -> None:
    job_id = create(worker, tiny_spec(model, distillation={"enabled": False}))
    run_through(worker, job_id)
    assert stage_row(worker, job_id, StageName.EVALUATION).metrics["pair"]["kv_tokens"] is None
    assert "kv_tokens" not in json.loads(content(worker, job_id, StageName.EXPORT, "decode/pdtrim.json"))


@torch.no_grad()
def plain_nll(prefill: Any, decode: Any, layer_map: list[int], ids: torch.Tensor, first_token: str) -> torch.Tensor:
    """−log p (batch, 16) of each token after prompts of 16, with caches of transformers alone."""
    read = 15 if first_token == "decode" else 16
    prompt = prefill(input_ids=ids[:, :read], use_cache=True)
    cache = DynamicCache(config=decode.config)
    cache.layers = [prompt.past_key_values.layers[source] for source in layer_map]
    rest = decode(input_ids=ids[:, read:-1], past_key_values=cache, use_cache=True)
    logits = torch.cat([prompt.logits, rest.logits], dim=1)[:, 15:]
    return F.cross_entropy(logits.mT, ids[:, 16:], reduction="none")


@pytest.mark.parametrize("first_token", ["decode", "prefill"])
def test_search_healing_and_evaluation_are_of_the_pair_as_it_is_served(
    worker: Worker, model: Path, tmp_path: Path, first_token: str
) -> None:
    spec = tiny_spec(
        model, serving={"first_token": first_token}, search={"evaluations": 12, "objective": "cross_entropy"}
    )
    spec["distillation"] |= {"losses": {"kl": 0, "label": 1, "hidden": 0}}
    job_id = create(worker, spec)
    run_through(worker, job_id)
    removal, healed, report = (
        stage_row(worker, job_id, stage).metrics
        for stage in (StageName.REMOVAL, StageName.DISTILLATION, StageName.EVALUATION)
    )
    for half in ("prefill", "decode"):
        for name in ("config.json", "model.safetensors", "pdtrim.json"):
            (tmp_path / half).mkdir(exist_ok=True)
            (tmp_path / half / name).write_bytes(content(worker, job_id, StageName.EXPORT, f"{half}/{name}"))
        assert json.loads((tmp_path / half / "pdtrim.json").read_text())["serving"] == {"first_token": first_token}
    prefill, decode = loaded_whole(tmp_path / "prefill"), loaded_whole(tmp_path / "decode")
    pair, layer_map = report["pair"], report["pair"]["kv_layer_map"]
    windows = load(content(worker, job_id, StageName.SCORING, "windows.safetensors"))

    # Evaluation, on the checkpoints.
    nll = {half: plain_nll(prefill, decode, layer_map, windows["validation"], half) for half in ("decode", "prefill")}
    assert pair["first_token"] == first_token
    assert pair["distilled_loss"] == pytest.approx(float(nll[first_token].mean()), abs=1e-4)
    first = {half: float(of_half[:, 0].mean()) for half, of_half in nll.items()}
    assert pair["first_token_losses"]["distilled"] == pytest.approx(first, abs=1e-4)
    dense = pair["first_token_losses"]["dense"]
    assert dense["decode"] == pytest.approx(dense["prefill"], abs=1e-4)
    # Healing, of the tokens that decode says. All calibration windows are fewer than those held out.
    held_out = plain_nll(prefill, decode, layer_map, windows["calibration"], first_token)
    said_by_decode = held_out if first_token == "decode" else held_out[:, 1:]
    found = healed["decode"]
    expected = found["after"] if found["kept"] == "distilled" else found["before"]
    assert float(said_by_decode.mean()) == pytest.approx(expected, abs=1e-4)
    # The search, before healing.
    before_prefill, before_decode = (
        drop_blocks(loaded_whole(model), [*removal[half]["deleted"], *map(int, removal[half]["distilled"])])
        for half in ("prefill", "decode")
    )
    searched = plain_nll(before_prefill, before_decode, layer_map, windows["calibration"], first_token)
    assert removal["losses"]["decode_text"] == pytest.approx(float(searched.mean()), abs=1e-4)


def test_what_the_threshold_has_distilled_is_named_in_plan_and_checkpoint(worker: Worker, model: Path) -> None:
    job_id = create(worker, tiny_spec(model))
    run_through(worker, job_id, StageName.EXPORT)
    plan = json.loads(content(worker, job_id, StageName.REMOVAL, "plan.json"))
    assert set(recorded(worker, job_id, StageName.REMOVAL)) == {"plan.json", "search.json"}
    assert plan["prefill"]["distilled"]
    for half in ("prefill", "decode"):
        described = json.loads(content(worker, job_id, StageName.EXPORT, f"{half}/pdtrim.json"))
        assert described["distilled_blocks"] == plan[half]["distilled"]


def test_two_runs_with_one_seed_give_byte_equal_plans(worker: Worker, model: Path) -> None:
    plans = []
    for _ in range(2):
        job_id = create(worker, tiny_spec(model, seed=11))
        run_through(worker, job_id, StageName.REMOVAL)
        plans.append([content(worker, job_id, StageName.REMOVAL, name) for name in ("plan.json", "search.json")])
    assert plans[0] == plans[1]


def test_protected_blocks_stay_and_forced_ones_go_from_both_halves(worker: Worker, model: Path) -> None:
    search = {"protect": [0, 3], "force": [4], "algorithm": "greedy"}
    job_id = create(worker, tiny_spec(model, search=search))
    run_through(worker, job_id, StageName.REMOVAL)
    plan = json.loads(content(worker, job_id, StageName.REMOVAL, "plan.json"))
    removed = {half: set(HalfPlan.model_validate(plan[half]).removed) for half in ("prefill", "decode")}
    assert removed["prefill"] == {4}
    assert removed["decode"] in ({1, 4}, {2, 4})


@pytest.mark.parametrize("algorithm", ["annealing", "greedy"])
def test_as_many_blocks_go_as_keep_perplexity_within_the_bound(algorithm: str, worker: Worker, model: Path) -> None:
    targets = {"prefill": {"max_perplexity_increase": 0.2}, "decode": {"max_perplexity_increase": 1.0}}
    job_id = create(worker, tiny_spec(model, search={"algorithm": algorithm, "evaluations": 40}, **targets))
    run_through(worker, job_id)
    metrics = stage_row(worker, job_id, StageName.REMOVAL).metrics
    removed = {half: set(HalfPlan.model_validate(metrics[half]).removed) for half in ("prefill", "decode")}
    assert removed["prefill"] <= removed["decode"]
    for half, target in targets.items():
        bound = metrics["bounds"][half]
        assert bound["met"]
        assert bound["perplexity_increase"] <= bound["max_perplexity_increase"] == target["max_perplexity_increase"]
        increases = {found["remove_blocks"]: found["perplexity_increase"] for found in bound["frontier"]}
        assert increases[len(removed[half])] == bound["perplexity_increase"]
        for count, increase in increases.items():
            assert increase > target["max_perplexity_increase"] or count <= len(removed[half])
    roles = {name.split("/")[0] for name in recorded(worker, job_id, StageName.EXPORT)}
    assert roles == ({"unified"} if removed["prefill"] == removed["decode"] else {"prefill", "decode"})


@pytest.mark.parametrize(("forced", "met"), [([], True), ([3], False)])
def test_where_no_block_can_go_within_the_bound_only_forced_ones_do_and_that_is_told(
    forced: list[int], met: bool, worker: Worker, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A random model may gain by losing a block; one that was trained loses.
    monkeypatch.setattr(PerplexityBound, "increase", lambda self, removed: 0.1 * len(removed))
    targets = {"prefill": {"max_perplexity_increase": 0.05}, "decode": {"max_perplexity_increase": 0.05}}
    job_id = create(worker, tiny_spec(model, search={"force": forced}, **targets))
    run_through(worker, job_id, StageName.REMOVAL)
    metrics = stage_row(worker, job_id, StageName.REMOVAL).metrics
    for half in ("prefill", "decode"):
        assert set(HalfPlan.model_validate(metrics[half]).removed) == set(forced)
        assert metrics["bounds"][half]["met"] is met
        assert len(metrics["bounds"][half]["frontier"]) == 3


@pytest.mark.parametrize(("algorithm", "prefill"), [("annealing", 1), ("exhaustive", 2), ("greedy", 0)])
def test_every_block_s_sensitivity_and_two_controls_stand_beside_the_nested_pair(
    algorithm: str, prefill: int, worker: Worker, model: Path
) -> None:
    search = {"algorithm": algorithm, "protect": [4], "racing": False}
    job_id = create(worker, tiny_spec(model, search=search, prefill={"remove_blocks": prefill}))
    run_through(worker, job_id, StageName.REMOVAL)
    metrics = stage_row(worker, job_id, StageName.REMOVAL).metrics
    plan = json.loads(content(worker, job_id, StageName.REMOVAL, "plan.json"))
    assert [plan[key] for key in ("losses", "sensitivity")] == [metrics[key] for key in ("losses", "sensitivity")]

    losses, sensitivity = metrics["losses"], metrics["sensitivity"]
    assert [found["block"] for found in sensitivity["blocks"]] == [0, 1, 2, 3]
    assert sensitivity["dense"]["both"] == pytest.approx(0, abs=1e-5)
    searched = SearchRecord.model_validate_json(content(worker, job_id, StageName.REMOVAL, "search.json"))
    for found in sensitivity["blocks"]:
        assert 0 < found["decode_only"] < 20
        if prefill:
            assert EvaluatedSet(removed=[found["block"]], loss=found["both"]) in searched.prefill
    controls = losses["controls"]
    if prefill == 0:
        assert controls["decode_only"] == losses["decode"]
    if prefill == 2:
        assert controls["decode_set_in_both"] == losses["decode"]


def test_sets_that_are_compared_folded_are_reported_by_what_they_cost_as_they_are(worker: Worker, model: Path) -> None:
    found = {}
    for folded in (False, True):
        spec = tiny_spec(model, search={"algorithm": "exhaustive", "folded": folded, "racing": False})
        spec["calibration"]["copying"] = 0.25  # On the same windows.
        job_id = create(worker, spec)
        run_through(worker, job_id, StageName.REMOVAL)
        metrics = stage_row(worker, job_id, StageName.REMOVAL).metrics
        plan = json.loads(content(worker, job_id, StageName.REMOVAL, "plan.json"))
        searched = SearchRecord.model_validate_json(content(worker, job_id, StageName.REMOVAL, "search.json"))
        assert metrics["losses"]["folded"] is folded
        alone = {found["block"]: found["both"] for found in metrics["sensitivity"]["blocks"]}
        for point in plan["frontier"]["prefill"]:
            if len(point["removed"]) == 1:
                assert point["loss"] == pytest.approx(alone[point["removed"][0]], rel=1e-5)
        assert metrics["losses"]["prefill"] == plan["frontier"]["prefill"][-1]["loss"]
        found[folded] = {one.removed[0]: one.loss for one in searched.prefill if len(one.removed) == 1}
    # Nothing stands before block 0, whose loss no fold changes.
    assert found[True].keys() == found[False].keys() == set(range(5))
    assert found[True][0] == found[False][0]


def test_a_search_out_of_time_still_removes_what_was_asked(worker: Worker, model: Path) -> None:
    found = {}
    for name, search in (("greedy", {"algorithm": "greedy"}), ("brief", {"evaluations": 1000, "seconds": 1e-9})):
        job_id = create(worker, tiny_spec(model, search=search))
        run_through(worker, job_id, StageName.REMOVAL)
        found[name] = stage_row(worker, job_id, StageName.REMOVAL).metrics["losses"]
    assert found["brief"] == found["greedy"]


def test_undistilled_export_keeps_the_source_weights(worker: Worker, model: Path) -> None:
    job_id = create(worker, tiny_spec(model, distillation={"enabled": False}))
    run_through(worker, job_id)
    decode = stage_row(worker, job_id, StageName.EVALUATION).metrics["models"]["decode"]
    assert decode["perplexity"] == decode["undistilled_perplexity"]


@pytest.mark.parametrize("threshold", [-1.0, 1.0])
def test_distillation_that_does_not_help_is_left_out_and_said_so(threshold: float, worker: Worker, model: Path) -> None:
    spec = tiny_spec(model)
    spec["distillation"] |= {"threshold": threshold, "learning_rate": 1.0}
    job_id = create(worker, spec)
    run_through(worker, job_id)
    found = stage_row(worker, job_id, StageName.DISTILLATION).metrics
    assert {found[half]["kept"] for half in ("prefill", "decode")} == {"undistilled"}
    models = stage_row(worker, job_id, StageName.EVALUATION).metrics["models"]
    for half in ("prefill", "decode"):
        assert models[half]["perplexity"] == models[half]["undistilled_perplexity"]
    with transaction(worker.database) as session:
        told = Console(width=300, record=True, file=io.StringIO())
        told.print(job_page(views.job(jobs.get(session, job_id), jobs.stages(session, [job_id])[job_id])))
    assert "prefill kept undistilled" in told.export_text()


@pytest.mark.parametrize(
    "family", [Gemma3TextConfig, MixtralConfig, Phi3Config, Starcoder2Config], ids=lambda family: family.model_type
)
def test_other_architectures_pass_every_stage(family: type[PretrainedConfig], worker: Worker, tmp_path: Path) -> None:
    job_id = create(worker, tiny_spec(write_tiny_model(tmp_path / "models" / "tiny", family)))
    run_through(worker, job_id, StageName.EVALUATION)
    exported = stage_row(worker, job_id, StageName.EXPORT).metrics["checkpoints"]
    assert max(checkpoint["max_logit_difference"] for checkpoint in exported.values()) <= 1e-5
    models = stage_row(worker, job_id, StageName.EVALUATION).metrics["models"]
    assert models["decode"]["blocks"] == 3


@pytest.mark.parametrize(
    ("config", "training"),
    [
        (LlamaConfig, {"learning_rate": 5e-4}),
        (Qwen3Config, {"learning_rate": 5e-4}),
        (Qwen3Config, {"learning_rate": 5e-3, "trainable": "lora", "lora": {"rank": 4, "alpha": 8}}),
    ],
)
def test_a_block_distilled_for_decode_alone_reads_the_keys_and_values_it_would_make(
    config: type[PretrainedConfig], training: dict[str, Any], worker: Worker, tmp_path: Path
) -> None:
    model = write_tiny_model(tmp_path / "models" / "tiny", config)
    spec = tiny_spec(model)
    spec["distillation"] |= {"heal_tokens": 2048, **training}
    job_id = create(worker, spec)
    run_through(worker, job_id, StageName.EXPORT)
    metrics = stage_row(worker, job_id, StageName.DISTILLATION).metrics
    assert [metrics[half]["kept"] for half in ("prefill", "decode")] == ["distilled", "distilled"]
    plan = json.loads(content(worker, job_id, StageName.REMOVAL, "plan.json"))
    [(_, absorber)] = plan["decode"]["distilled"].items() - plan["prefill"]["distilled"].items()

    prefill, decode = (
        load(content(worker, job_id, StageName.EXPORT, f"{half}/model.safetensors")) for half in ("prefill", "decode")
    )
    described = json.loads(content(worker, job_id, StageName.EXPORT, "decode/pdtrim.json"))
    layer = described["kept_blocks"].index(absorber)
    source = described["kv_layer_map"][layer]
    dense = load_file(model / "model.safetensors")
    of_block = f"model.layers.{source}."
    names = (name.removeprefix(of_block) for name in prefill if name.startswith(of_block))
    shaping = [name for name in names if re.match(r"input_layernorm|self_attn\.[kv]_", name)]
    assert len(shaping) == (4 if config is Qwen3Config else 3)
    for name in shaping:
        sent = prefill[f"model.layers.{source}.{name}"]
        assert torch.equal(decode[f"model.layers.{layer}.{name}"], sent)
        # Healing did change them: decode has to hold prefill's, not the dense model's. Norms have no adapters.
        healed = "proj" in name or training.get("trainable") != "lora"
        assert torch.equal(sent, dense[f"model.layers.{absorber}.{name}"]) != healed
    trained = "mlp.down_proj.weight"
    assert not torch.equal(decode[f"model.layers.{layer}.{trained}"], prefill[f"model.layers.{source}.{trained}"])


@pytest.mark.parametrize(
    ("prefill", "decode", "training", "channels"),
    [
        ((0, 0.5), (0, 0.5), {}, {"unified": 24}),
        ((2, 0.25), (2, 0.25), {"trainable": "lora", "learning_rate": 5e-3}, {"unified": 16}),
        ((1, 0.75), (2, 0.5), {}, {"prefill": 32, "decode": 24}),
        ((1, 0.5), (2, 1), {"trainable": "lora", "learning_rate": 2e-3}, {"prefill": 24, "decode": 48}),
        ((1, 1), (1, 0.5), {"gradient_checkpointing": True}, {"prefill": 48, "decode": 24}),
        ((1, 0.5), (2, 0.75), {"enabled": False}, {"prefill": 24, "decode": 32}),
    ],
)
def test_narrower_mlps_are_healed_exported_and_measured(
    prefill: tuple[int, float],
    decode: tuple[int, float],
    training: dict[str, Any],
    channels: dict[str, int],
    worker: Worker,
    model: Path,
    tmp_path: Path,
) -> None:
    targets = {
        half: {"remove_blocks": blocks, "mlp_width": width}
        for half, (blocks, width) in {"prefill": prefill, "decode": decode}.items()
    }
    spec = tiny_spec(model, **targets)
    spec["distillation"] |= {"heal_tokens": 2048, **training}
    job_id = create(worker, spec)
    run_through(worker, job_id)

    report = stage_row(worker, job_id, StageName.EVALUATION).metrics
    shown = {name: found["mlp_channels"] for name, found in report["models"].items()}
    assert shown == {"dense": 48, **channels}
    exported = recorded(worker, job_id, StageName.EXPORT)
    proofs = stage_row(worker, job_id, StageName.EXPORT).metrics["checkpoints"]
    healed = stage_row(worker, job_id, StageName.DISTILLATION).metrics
    dense = load_file(model / "model.safetensors")
    for role, kept in channels.items():
        for name, row in exported.items():
            if name.startswith(f"{role}/"):
                (tmp_path / name).parent.mkdir(exist_ok=True)
                worker.store.download(row.key, tmp_path / name)
        loaded = loaded_whole(tmp_path / role)
        assert loaded.config.intermediate_size == kept
        assert proofs[role]["max_logit_difference"] <= 1e-5
        described = json.loads((tmp_path / role / "pdtrim.json").read_text())
        width = targets["decode" if role == "decode" else "prefill"]["mlp_width"]
        assert described.get("mlp_width", 1) == width
        assert ("MLP channels" in (tmp_path / role / "README.md").read_text()) == (width < 1)
        undistilled = report["models"][role]["undistilled_perplexity"]["value"]
        if spec["distillation"].get("enabled", True):
            half = "decode" if role == "decode" else "prefill"
            assert healed[half]["kept"] == "distilled"
            assert healed[half]["after"] < healed[half]["before"]
        else:
            assert report["models"][role]["perplexity"]["value"] == undistilled
            block = described["kept_blocks"][0]
            chosen = load(content(worker, job_id, StageName.SCORING, "channels.safetensors"))[f"{role}.{block}"]
            found = loaded.get_parameter("model.layers.0.mlp.down_proj.weight")
            assert torch.equal(found, dense[f"model.layers.{block}.mlp.down_proj.weight"][:, chosen.long()])

    # The hand-over does not see the width: decode continues prefill's cache as in any job.
    served = PrefillDecodePair.load(*(tmp_path / role for role in (max(channels), min(channels))))
    windows = load(content(worker, job_id, StageName.SCORING, "windows.safetensors"))["validation"]
    sent = served.prefill(windows[:1, :16]).nbytes
    assert sent == report["pair"]["kv_bytes_per_request"]["sent"] == 2 * (5 - decode[0]) * 2 * 8 * 15 * 4


def test_mlp_channels_are_those_that_weigh_most_and_the_narrower_half_keeps_a_part_of_them(
    worker: Worker, model: Path
) -> None:
    targets = {
        "prefill": {"remove_blocks": 0, "mlp_width": 0.75},
        "decode": {"remove_blocks": 0, "mlp_width": 0.5},
    }
    job_id = create(worker, tiny_spec(model, **targets))
    run_through(worker, job_id, StageName.SCORING)
    found = load(content(worker, job_id, StageName.SCORING, "channels.safetensors"))
    windows = load(content(worker, job_id, StageName.SCORING, "windows.safetensors"))["calibration"]
    stack = block_stack(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    expected = kept_channels(channel_scores(stack, windows, chunk_windows=len(windows)), 32)
    assert {block: tuple(found[f"prefill.{block}"].tolist()) for block in range(5)} == expected
    for block in range(5):
        assert len(found[f"decode.{block}"]) == 24
        assert set(found[f"decode.{block}"].tolist()) < set(expected[block])


TASK = {
    "task": "sums",
    "docs": [{"asked": f"{n} + {n} =", "right": str(2 * n), "wrong": str(n)} for n in range(1, 9)],
    "doc_to_text": "asked",
    "doc_to_choice": ["{{right}}", "{{wrong}}"],
    "doc_to_target": 0,
}


@pytest.mark.parametrize(("prefill_removes", "roles"), [(1, {"prefill", "decode", "pair"}), (2, {"unified"})])
def test_tasks_and_prompts_of_the_job_are_asked_of_the_dense_model_and_of_what_is_served(
    prefill_removes: int, roles: set[str], worker: Worker, model: Path
) -> None:
    spec = tiny_spec(model, prefill={"remove_blocks": prefill_removes}, distillation={"enabled": False})
    spec["evaluation"] |= {"tasks": [TASK], "prompts": ["def f(x):\n", "\x1bimport"], "sample_tokens": 4}
    job_id = create(worker, spec)
    run_through(worker, job_id)
    report = stage_row(worker, job_id, StageName.EVALUATION).metrics
    assert json.loads(content(worker, job_id, StageName.EVALUATION, "report.json"))["tasks"] == report["tasks"]
    assert report["tasks"].keys() == {"sums"}
    assert report["tasks"]["sums"].keys() == {"dense", *roles}
    for found in report["tasks"]["sums"].values():
        assert 0 <= found["acc"]["value"] <= 1
        assert found["acc"]["stderr"] is not None
    served = "pair" if "pair" in roles else "unified"
    assert [one["prompt"] for one in report["samples"]] == ["def f(x):\n", "\ufffdimport"]
    assert all(one["continuations"].keys() == {"dense", served} for one in report["samples"])


def test_tasks_that_a_worker_cannot_run_fail_the_job_in_its_first_stage(
    worker: Worker, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.stages.evaluation_tasks.find_spec", lambda name: None)
    spec = tiny_spec(model)
    spec["evaluation"]["tasks"] = [TASK, "arc_easy"]
    job_id = create(worker, spec)
    run_stage(worker, job_id, StageName.SCORING)
    error = job_error(worker, job_id)
    assert (error["code"], error["param"]) == ("extra_not_installed", "evaluation.tasks[1]")
    assert "pip install 'pdtrim[eval]'" in error["message"]


def test_a_repeated_delivery_of_a_finished_stage_does_nothing(worker: Worker, model: Path) -> None:
    job_id = create(worker, tiny_spec(model))
    run_stage(worker, job_id, StageName.SCORING)
    before = event_types(worker, job_id)
    run_stage(worker, job_id, StageName.SCORING)
    assert event_types(worker, job_id) == before


def test_a_stage_finished_by_a_worker_that_died_before_recording_is_not_run_again(worker: Worker, model: Path) -> None:
    job_id = create(worker, tiny_spec(model))
    with transaction(worker.database) as session:
        dead = stages.claim(session, job_id, StageName.SCORING, worker="dead", lease_seconds=0.05)
    assert dead is not None
    # The dead worker came as far as its manifest.
    pipeline._execute(worker, dead, check=lambda: None)
    time.sleep(0.1)
    retire(worker, job_id, StageName.SCORING)
    run_stage(worker, job_id, StageName.SCORING)
    row = stage_row(worker, job_id, StageName.SCORING)
    assert (row.status, row.attempt) == (StageStatus.SUCCEEDED, 2)
    assert all("/scoring/1/" in artifact.key for artifact in recorded(worker, job_id, StageName.SCORING).values())


@pytest.mark.parametrize(
    ("stage", "trainable"),
    [(StageName.REMOVAL, "all"), (StageName.DISTILLATION, "all"), (StageName.DISTILLATION, "lora")],
)
def test_an_interrupted_stage_goes_on_where_it_stopped_and_ends_the_same(
    stage: StageName, trainable: str, worker: Worker, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.stages.search_state.SAVE_INTERVAL_S", 0.0)
    monkeypatch.setattr("workers.stages.training.SAVE_INTERVAL_S", 0.0)
    spec = tiny_spec(model)
    spec["distillation"] |= {
        "losses": {"kl": 1, "label": 0.5, "hidden": 0.5},
        "gradient_accumulation": 2,
        "gradient_checkpointing": True,
        "patience": 2,
        "trainable": trainable,
    }
    unbroken, broken = (create(worker, spec) for _ in range(2))
    for job_id in (unbroken, broken):
        for earlier in list(StageName)[: list(StageName).index(stage)]:
            run_stage(worker, job_id, earlier)
    run_stage(worker, unbroken, stage)

    with transaction(worker.database) as session:
        claim = stages.claim(session, broken, stage, worker="dying", lease_seconds=0.0)
    assert claim is not None
    checks = 0

    def die_after_a_while() -> None:
        nonlocal checks
        checks += 1
        if checks > 4 and list(worker.store.list_keys(f"jobs/{broken}/{stage}/state")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline._execute(worker, claim, die_after_a_while)
    assert list(worker.store.list_keys(f"jobs/{broken}/{stage}/state"))
    retire(worker, broken, stage)
    run_stage(worker, broken, stage)

    first, second = (recorded(worker, job_id, stage) for job_id in (unbroken, broken))
    assert {name: row.sha256 for name, row in first.items()} == {name: row.sha256 for name, row in second.items()}
    # Jobs that are cut from this one read the search's state; the others are of no use any more.
    left = list(worker.store.list_keys(f"jobs/{broken}/{stage}/state"))
    assert bool(left) == (stage == StageName.REMOVAL)


def test_cancellation_stops_a_running_stage(worker: Worker, model: Path) -> None:
    job_id = create(worker, tiny_spec(model, distillation={"heal_tokens": 10**9, "batch_windows": 1}))
    run_through(worker, job_id, StageName.REMOVAL)
    running = Thread(target=run_stage, args=(worker, job_id, StageName.DISTILLATION))
    running.start()
    wait_for(lambda: stage_row(worker, job_id, StageName.DISTILLATION).progress > 0)
    with transaction(worker.database) as session:
        jobs.request_cancel(session, job_id)
    asked_at = time.monotonic()
    running.join(60)
    assert time.monotonic() - asked_at < 10
    assert event_types(worker, job_id)[-1] == "job.cancelled"


@pytest.mark.parametrize("stage", [StageName.REMOVAL, StageName.DISTILLATION])
def test_a_paused_stage_stops_within_seconds_and_ends_as_one_that_was_never_paused(
    stage: StageName, worker: Worker, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.running.lease.HEARTBEAT_S", 0.02)
    monkeypatch.setattr("workers.stages.search_state.SAVE_INTERVAL_S", 0.0)
    monkeypatch.setattr("workers.stages.training.SAVE_INTERVAL_S", 0.0)
    spec = tiny_spec(model, prefill={"remove_blocks": 2}, decode={"remove_blocks": 3})
    spec["search"] = {"algorithm": "exhaustive"}
    spec["distillation"] |= {"heal_tokens": 4096}
    unbroken, broken = (create(worker, spec) for _ in range(2))
    for job_id in (unbroken, broken):
        for earlier in list(StageName)[: list(StageName).index(stage)]:
            run_stage(worker, job_id, earlier)
    run_stage(worker, unbroken, stage)

    running = Thread(target=run_stage, args=(worker, broken, stage))
    running.start()
    wait_for(lambda: bool(list(worker.store.list_keys(f"jobs/{broken}/{stage}/state"))))
    with transaction(worker.database) as session:
        jobs.request_pause(session, broken)
    asked_at = time.monotonic()
    running.join(60)
    assert time.monotonic() - asked_at < 5
    assert event_types(worker, broken)[-1] == "job.paused"
    with transaction(worker.database) as session:
        assert jobs.resume(session, broken)[1] == stage
    run_stage(worker, broken, stage)

    first, second = (recorded(worker, job_id, stage) for job_id in (unbroken, broken))
    assert {name: row.sha256 for name, row in first.items()} == {name: row.sha256 for name, row in second.items()}
    assert stage_row(worker, broken, stage).attempt == 2


def test_a_worker_that_is_to_end_hands_its_stage_to_another(worker: Worker, model: Path) -> None:
    job_id = create(worker, tiny_spec(model))
    run_stage(replace(worker, stopping=lambda: True), job_id, StageName.SCORING)
    assert stage_row(worker, job_id, StageName.SCORING).status == StageStatus.QUEUED
    assert event_types(worker, job_id)[-1] == "stage.requeued"
    run_through(worker, job_id, StageName.SCORING)


def test_every_stage_can_be_stopped_before_each_block_it_runs(worker: Worker, model: Path) -> None:
    job_id = create(worker, tiny_spec(model))
    for stage in StageName:
        with transaction(worker.database) as session:
            claim = stages.claim(session, job_id, stage, worker="test", lease_seconds=600)
        assert claim is not None
        checks = 0

        def count() -> None:
            nonlocal checks
            checks += 1

        finished = pipeline._execute(worker, claim, count)
        with transaction(worker.database) as session:
            stages.complete(
                session,
                claim,
                artifacts=finished.artifacts,
                metrics=finished.result.model_dump(mode="json"),
                versions={},
            )
        assert checks >= 15, stage  # without those of blocks: 5 or fewer in scoring


def test_a_worker_whose_stage_was_taken_over_steps_back(worker: Worker, model: Path) -> None:
    job_id = create(worker, tiny_spec(model, distillation={"heal_tokens": 10**9, "batch_windows": 1}))
    run_through(worker, job_id, StageName.REMOVAL)
    running = Thread(target=run_stage, args=(worker, job_id, StageName.DISTILLATION))
    running.start()
    wait_for(lambda: stage_row(worker, job_id, StageName.DISTILLATION).progress > 0)
    with transaction(worker.database) as session:
        row = session.get_one(StageRow, (job_id, StageName.DISTILLATION))
        row.attempt += 1
    running.join(60)
    row = stage_row(worker, job_id, StageName.DISTILLATION)
    assert (row.status, row.attempt) == (StageStatus.RUNNING, 2)
    assert not recorded(worker, job_id, StageName.DISTILLATION)


def test_a_store_that_fails_costs_an_attempt_not_the_job(worker: Worker, model: Path) -> None:
    job_id = create(worker, tiny_spec(model))
    root = worker.settings.data_dir / "artifacts"
    root.write_text("a file where a folder should be")
    run_stage(worker, job_id, StageName.SCORING)
    assert stage_row(worker, job_id, StageName.SCORING).status == StageStatus.QUEUED
    assert event_types(worker, job_id)[-1] == "stage.requeued"
    root.unlink()
    run_stage(worker, job_id, StageName.SCORING)
    assert stage_row(worker, job_id, StageName.SCORING).status == StageStatus.SUCCEEDED


def test_a_store_that_is_closed_to_us_fails_the_job_at_once(
    worker: Worker, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(key: str, data: bytes, check: Callable[[], None]) -> None:
        raise StoreRefused("bucket pdtrim refused: AccessDenied")

    job_id = create(worker, tiny_spec(model))
    monkeypatch.setattr(worker.store, "put_bytes", refuse)
    run_stage(worker, job_id, StageName.SCORING)
    assert job_error(worker, job_id)["code"] == "store_refused"


def test_a_full_disk_costs_an_attempt_not_the_job(worker: Worker, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(context: StageContext) -> Result:
        with Path("/dev/full").open("wb", buffering=0) as disk:
            disk.write(b"x")
        return RESULTS[StageName.SCORING]

    job_id = create(worker, tiny_spec(model))
    with monkeypatch.context() as patch:
        patch.setitem(STAGES, StageName.SCORING, fill)
        run_stage(worker, job_id, StageName.SCORING)
    with transaction(worker.database) as session:
        last = events.page(session, job_id, after=0, limit=1000)[0][-1]
    assert last.type == "stage.requeued"
    assert "No space left on device" in last.message
    run_stage(worker, job_id, StageName.SCORING)
    assert stage_row(worker, job_id, StageName.SCORING).status == StageStatus.SUCCEEDED


def test_a_database_that_is_away_when_progress_is_told_stops_no_work(
    worker: Worker, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*args: object, **kwargs: object) -> None:
        raise OperationalError("UPDATE stages", {}, Exception("the server closed the connection"))

    job_id = create(worker, tiny_spec(model))
    monkeypatch.setattr(stages, "record_progress", away)
    run_stage(worker, job_id, StageName.SCORING)
    assert stage_row(worker, job_id, StageName.SCORING).status == StageStatus.SUCCEEDED
    assert "stage.progress" not in event_types(worker, job_id)


def test_a_worker_that_comes_back_to_a_stage_taken_over_leaves_the_other_its_folder(
    worker: Worker, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = create(worker, tiny_spec(model))
    succeeded = STAGES[StageName.SCORING]

    def be_overtaken(context: StageContext) -> Result:
        """What a process does that was stopped for longer than its lease, and its successor meanwhile."""
        monkeypatch.setitem(STAGES, StageName.SCORING, let_the_other_go_first)
        with transaction(worker.database) as session:
            session.get_one(StageRow, (job_id, StageName.SCORING)).lease_expires_at = now() - timedelta(seconds=1)
        retire(worker, job_id, StageName.SCORING)
        successor.start()
        assert working.wait(60)
        raise ValueError("the first worker goes on, and stumbles")

    def let_the_other_go_first(context: StageContext) -> Result:
        (context.out / "early").write_text("x")
        working.set()
        stumbled.wait(60)
        return succeeded(context)

    working, stumbled = Event(), Event()
    successor = Thread(target=run_stage, args=(worker, job_id, StageName.SCORING))
    monkeypatch.setitem(STAGES, StageName.SCORING, be_overtaken)
    run_stage(worker, job_id, StageName.SCORING)
    stumbled.set()
    successor.join(60)
    row = stage_row(worker, job_id, StageName.SCORING)
    assert (row.status, row.attempt) == (StageStatus.SUCCEEDED, 2)
    assert "early" in recorded(worker, job_id, StageName.SCORING)


def test_a_stage_that_takes_longer_than_it_may_fails_by_name_and_goes_on_after_a_resume(
    worker: Worker, model: Path
) -> None:
    job_id = create(worker, tiny_spec(model, deadline_seconds=0.001))
    run_stage(worker, job_id, StageName.SCORING)
    assert job_error(worker, job_id)["code"] == "deadline_exceeded"
    with transaction(worker.database) as session:
        job, stage = jobs.resume(session, job_id)
        job.spec = {**job.spec, "deadline_seconds": 600}
    run_stage(worker, job_id, stage)
    assert stage_row(worker, job_id, stage).status == StageStatus.SUCCEEDED


def test_a_process_whose_stage_hangs_after_it_was_lost_is_given_up(
    worker: Worker, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.running.lease.HEARTBEAT_S", 0.02)
    monkeypatch.setattr("workers.running.lease.STUCK_S", 0.1)
    given_up = Event()

    def hang(context: StageContext) -> Result:
        with transaction(worker.database) as session:
            stages.time_out(session, job_id, StageName.SCORING, deadline_seconds=0.001, grace_seconds=0)
        assert given_up.wait(60)
        return RESULTS[StageName.SCORING]

    job_id = create(worker, tiny_spec(model))
    monkeypatch.setitem(STAGES, StageName.SCORING, hang)
    run_stage(replace(worker, abandon=given_up.set), job_id, StageName.SCORING)
    assert given_up.is_set()
    assert job_error(worker, job_id)["code"] == "deadline_exceeded"


def test_an_input_whose_bytes_changed_is_not_used(worker: Worker, model: Path) -> None:
    job_id = create(worker, tiny_spec(model))
    run_through(worker, job_id, StageName.SCORING)
    worker.store.put_bytes(recorded(worker, job_id, StageName.SCORING)["scores.json"].key, b"{}")
    run_stage(worker, job_id, StageName.REMOVAL)
    with transaction(worker.database) as session:
        last = events.page(session, job_id, after=0, limit=1000)[0][-1]
    assert last.type == "stage.requeued"
    assert "CorruptArtifact" in last.message
    assert "scores.json" in last.message


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"data": {"text": "short"}}, "invalid_request", "data"),
        ({"decode": {"remove_blocks": 5}}, "too_many_blocks", "decode.remove_blocks"),
        ({"model": "file:///etc"}, "source_not_allowed", None),
    ],
)
def test_what_no_worker_can_do_fails_the_job_with_its_reason(
    changes: dict[str, Any], code: str, param: str | None, worker: Worker, model: Path
) -> None:
    job_id = create(worker, tiny_spec(model, **changes))
    run_stage(worker, job_id, StageName.SCORING)
    error = job_error(worker, job_id)
    assert (error["code"], error["param"]) == (code, param)


def test_memory_that_does_not_suffice_fails_the_stage_by_name(
    worker: Worker, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = create(worker, tiny_spec(model))
    monkeypatch.setitem(STAGES, StageName.SCORING, lambda context: torch.empty(2**60))
    run_stage(worker, job_id, StageName.SCORING)
    error = job_error(worker, job_id)
    assert error["code"] == "out_of_memory"
    assert "can't allocate memory" in error["message"]


def test_a_model_whose_blocks_do_not_make_its_logits_fails_the_job_by_name(worker: Worker, tmp_path: Path) -> None:
    job_id = create(worker, tiny_spec(write_tiny_model(tmp_path / "models" / "modernbert", ModernBertDecoderConfig)))
    run_stage(worker, job_id, StageName.SCORING)
    error = job_error(worker, job_id)
    assert error["code"] == "model_unsupported"
    assert "modernbert" in error["message"]


@pytest.mark.parametrize(
    "targets",
    [
        {"prefill": {"kv_only_blocks": 1}, "decode": {"remove_blocks": 1}},
        {"prefill": {"flops": 0.8}, "decode": {"remove_blocks": 1}},
        {"prefill": {"remove_blocks": 0}, "decode": {"kv_bytes": 0.7}},
        {"prefill": {"remove_blocks": 0}, "decode": {"weight_bytes": 0.95}},
    ],
)
def test_parts_that_no_block_can_be_without_fail_the_job_before_anything_is_measured(
    targets: dict[str, Any], worker: Worker, tmp_path: Path
) -> None:
    # It norms behind its attention and its MLP: without them the hidden state does not pass unchanged.
    def normed_behind(**sizes: Any) -> OPTConfig:
        known = {key: value for key, value in sizes.items() if key not in ("intermediate_size", "num_key_value_heads")}
        return OPTConfig(**known, ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=False)

    job_id = create(worker, tiny_spec(write_tiny_model(tmp_path / "models" / "opt", normed_behind), **targets))
    run_stage(worker, job_id, StageName.SCORING)
    assert job_error(worker, job_id)["code"] == "model_unsupported"


def test_weights_of_another_model_fail_the_job_before_anything_is_measured(worker: Worker, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    )
    job_id = create(worker, tiny_spec(model))
    run_stage(worker, job_id, StageName.SCORING)
    error = job_error(worker, job_id)
    assert error["code"] == "source_unreadable"
    assert "of the model's tensors, first transformer.h.0" in error["message"]


def test_windows_of_a_job_begin_as_the_models_tokenizer_begins_a_text(
    worker: Worker, model: Path, tmp_path: Path
) -> None:
    begin = 5
    framed_tokenizer((begin,), (6,)).save_pretrained(model)
    job_id = create(worker, tiny_spec(model))
    run_through(worker, job_id)

    windows = load(content(worker, job_id, StageName.SCORING, "windows.safetensors"))
    for part in windows.values():
        assert (part[:, 0] == begin).all()
        assert (part[:, 1:] != begin).all()
        assert (part != 6).all()
    scored = stage_row(worker, job_id, StageName.SCORING).metrics
    assert scored is not None
    (said,) = scored["opening"]
    assert json.loads(content(worker, job_id, StageName.EXPORT, "decode/pdtrim.json"))["opening"] == [said]
    assert f"begins a text with `{said}`" in content(worker, job_id, StageName.EVALUATION, "decode/README.md").decode()
    validation = windows["validation"]
    dense = loaded_whole(model)

    def loss(windows: torch.Tensor) -> float:
        with torch.no_grad():
            logits = dense(input_ids=windows).logits[:, 15:-1]
        return float(F.cross_entropy(logits.flatten(0, 1), windows[:, 16:].flatten()))

    copying = torch.cat([validation[:, :16], validation[:, 1:16], validation[:, 1:2]], dim=1)
    measured = json.loads(content(worker, job_id, StageName.EVALUATION, "report.json"))["pair"]
    assert measured["dense_loss"] == pytest.approx(loss(validation), abs=1e-4)
    assert measured["copying"]["dense"] == pytest.approx(loss(copying), abs=1e-4)


def test_what_guesses_tokens_ahead_and_no_longer_can_is_told_in_result_card_and_report(
    worker: Worker, model: Path
) -> None:
    tensors = load_file(model / "model.safetensors") | {"mtp.fc.weight": torch.ones(2, 2)}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text()) | {"eagle_config": {"layers": [1]}}
    (model / "config.json").write_text(json.dumps(config))
    job_id = create(worker, tiny_spec(model))
    run_through(worker, job_id)

    exported = stage_row(worker, job_id, StageName.EXPORT).metrics
    assert exported is not None
    about_layers, about_heads = exported["notes"]
    assert "(MTP) are left out" in about_layers
    assert "(eagle_config in config.json)" in about_heads
    assert json.loads(content(worker, job_id, StageName.EXPORT, "prefill/pdtrim.json"))["notes"] == exported["notes"]
    for stage, name in (
        (StageName.EXPORT, "decode/README.md"),
        (StageName.EVALUATION, "decode/README.md"),
        (StageName.EVALUATION, "report.html"),
    ):
        told = html.unescape(content(worker, job_id, stage, name).decode())
        assert about_layers in told
        assert about_heads in told


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5", "qwen3_vl"])
def test_the_text_decoder_of_a_model_that_sees_is_pruned_in_its_place(
    family: str, worker: Worker, tmp_path: Path
) -> None:
    model, whole = tmp_path / "models" / "seeing", whole_model(family)
    whole.save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(REFERENCE / name, model / name)
    (model / "preprocessor_config.json").write_text('{"size": 16}')
    kept = {"search": {"protect": [0, 1], "evaluations": 4}} if family == "qwen3_vl" else {}
    job_id = create(worker, tiny_spec(model, decode={"remove_blocks": 1}, distillation={"enabled": False}, **kept))
    run_through(worker, job_id)

    target = tmp_path / "unified"
    for name in recorded(worker, job_id, StageName.EXPORT):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(worker, job_id, StageName.EXPORT, name))
    assert (target / "preprocessor_config.json").read_text() == '{"size": 16}'
    assert "AutoModelForImageTextToText" in (target / "README.md").read_text()
    plan = json.loads(content(worker, job_id, StageName.REMOVAL, "plan.json"))["prefill"]
    removed = [*plan["deleted"], *map(int, plan["distilled"])]
    with passing(decoder_blocks(whole), removed):
        truth = logits(whole, question(family))
    assert len(removed) == 1
    assert torch.allclose(logits(reloaded_whole(target), question(family)), truth, atol=1e-5)


def test_halves_of_a_model_that_sees_are_healed_whole(worker: Worker, tmp_path: Path) -> None:
    model, whole = tmp_path / "models" / "seeing", whole_model("smolvlm")
    whole.save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(REFERENCE / name, model / name)
    job_id = create(worker, tiny_spec(model))
    run_through(worker, job_id)

    source = load_file(model / "model.safetensors")
    report = json.loads(content(worker, job_id, StageName.EVALUATION, "report.json"))
    for half, blocks in (("prefill", 4), ("decode", 3)):
        tensors = load(content(worker, job_id, StageName.EXPORT, f"{half}/model.safetensors"))
        assert all(torch.equal(tensors[name], source[name]) for name in source if ".text_model." not in name)
        assert any(not torch.equal(tensors[name], source[name]) for name in tensors if ".text_model.layers.0" in name)
        assert report["models"][half]["blocks"] == blocks
    assert report["pair"]["distilled_loss"] < report["pair"]["pruned_loss"]


def test_text_from_the_standard_library_needs_no_source(worker: Worker, model: Path) -> None:
    job_id = create(worker, tiny_spec(model, data={}))
    run_through(worker, job_id, StageName.SCORING)
    windows = stage_row(worker, job_id, StageName.SCORING).metrics["windows"]
    assert windows["calibration"] == 4
    assert windows["validation"] == 4


PARTS: list[tuple[dict[str, int], dict[str, int]]] = [
    ({"remove_blocks": 0, "kv_only_blocks": 2}, {"remove_blocks": 0}),
    ({"remove_blocks": 1, "kv_only_blocks": 1, "remove_mlps": 1}, {"remove_blocks": 2, "remove_attentions": 1}),
    ({"remove_blocks": 0}, {"remove_blocks": 0, "remove_attentions": 1, "remove_mlps": 2}),
]


def test_halves_that_give_up_the_same_parts_are_one_checkpoint_healed_on_its_own_predictions(
    worker: Worker, model: Path
) -> None:
    gives_up = {"remove_blocks": 1, "remove_mlps": 4}
    job_id = create(worker, tiny_spec(model, prefill=gives_up, decode=gives_up))
    run_through(worker, job_id)
    removal, export = (stage_row(worker, job_id, stage).metrics for stage in (StageName.REMOVAL, StageName.EXPORT))
    assert removal["prefill"]["parts"] == removal["decode"]["parts"]
    assert len(removal["prefill"]["parts"]) == 4
    assert list(export["checkpoints"]) == ["unified"]


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        ({"flops": 0.6}, {"kv_bytes": 0.55}),
        ({"flops": 0.6}, {"remove_blocks": 2}),
        ({"remove_blocks": 1}, {"remove_blocks": 1, "weight_bytes": 0.94}),
    ],
)
def test_a_budget_is_kept_by_what_goes_and_the_pair_is_as_plain_transformers_has_it(
    prefill: dict[str, Any], decode: dict[str, Any], worker: Worker, model: Path, tmp_path: Path
) -> None:
    spec = tiny_spec(model, prefill=prefill, decode=decode, search={"evaluations": 12, "objective": "cross_entropy"})
    spec["distillation"] |= {"enabled": False}
    job_id = create(worker, spec)
    run_through(worker, job_id)
    removal, report = (stage_row(worker, job_id, stage).metrics for stage in (StageName.REMOVAL, StageName.EVALUATION))

    budgets = {found["half"]: found for found in removal["budgets"]}
    asked = {
        half: cost
        for half, target in (("decode", decode), ("prefill", prefill))
        if (cost := {name: share for name, share in target.items() if name != "remove_blocks"})
    }
    assert list(budgets) == list(asked)
    for half, cost in asked.items():
        found = budgets[half]
        assert {found["cost"]: found["asked"]} == cost
        assert found["met"]
        assert found["share"] <= found["asked"]
        # Every kind of unit together, then each alone.
        assert len(found["walks"]) == len(found["walks"][0]["kinds"]) + 1
        # Decode's losses are those beside the prefill half before its own budget.
        if half == list(asked)[-1]:
            assert removal["losses"]["decode"] <= min(w["steps"][-1]["loss"] for w in found["walks"] if w["met"])

    # What is left of the cost, from the exported files alone.
    halves: dict[str, Any] = {}
    for half in ("prefill", "decode"):
        (tmp_path / half).mkdir()
        for name in ("config.json", "model.safetensors", "pdtrim.json"):
            (tmp_path / half / name).write_bytes(content(worker, job_id, StageName.EXPORT, f"{half}/{name}"))
        halves[half] = loaded_whole(tmp_path / half)
    dense = report["models"]["dense"]
    if "kv_bytes" in decode:
        dead = json.loads((tmp_path / "decode" / "pdtrim.json").read_text()).get("dead_units", {})
        layers = report["models"]["decode"]["blocks"] - list(dead.values()).count("attention")
        assert budgets["decode"]["share"] == pytest.approx(layers / dense["blocks"])

    windows = load(content(worker, job_id, StageName.SCORING, "windows.safetensors"))
    layer_map = report["pair"]["kv_layer_map"]
    loss = plain_nll(halves["prefill"], halves["decode"], layer_map, windows["calibration"], "decode").mean()
    assert removal["losses"]["decode_text"] == pytest.approx(float(loss), abs=1e-4)


@pytest.mark.parametrize("heals", [False, True])
@pytest.mark.parametrize("first_token", ["decode", "prefill"])
@pytest.mark.parametrize(("prefill", "decode"), PARTS)
def test_parts_of_blocks_are_searched_exported_and_measured_as_plain_transformers_has_them(
    prefill: dict[str, int],
    decode: dict[str, int],
    first_token: str,
    heals: bool,
    worker: Worker,
    model: Path,
    tmp_path: Path,
) -> None:
    spec = tiny_spec(
        model,
        prefill=prefill,
        decode=decode,
        serving={"first_token": first_token},
        search={"evaluations": 12, "objective": "cross_entropy"},
    )
    spec["distillation"] |= {"enabled": heals, "threshold": -1.0}
    job_id = create(worker, spec)
    run_through(worker, job_id)
    removal, report = (stage_row(worker, job_id, stage).metrics for stage in (StageName.REMOVAL, StageName.EVALUATION))

    # What was asked for is what went, and checkpoints say so.
    halves: dict[str, Any] = {}
    for half, asked in (("prefill", prefill), ("decode", decode)):
        (tmp_path / half).mkdir()
        for name in ("config.json", "model.safetensors", "pdtrim.json"):
            (tmp_path / half / name).write_bytes(content(worker, job_id, StageName.EXPORT, f"{half}/{name}"))
        parts = removal[half]["parts"]
        counts = [list(parts.values()).count(part) for part in ("kv_only", "attention", "mlp")]
        assert counts == [asked.get(key, 0) for key in ("kv_only_blocks", "remove_attentions", "remove_mlps")]
        assert json.loads((tmp_path / half / "pdtrim.json").read_text()).get("dead_units", {}) == parts
        halves[half] = loaded_whole(tmp_path / half)

    # Plain transformers computes the same from the files alone.
    windows = load(content(worker, job_id, StageName.SCORING, "windows.safetensors"))
    layer_map = report["pair"]["kv_layer_map"]

    prompt = windows["validation"].shape[1] // 2
    copying = {split: torch.cat([part[:, :prompt], part[:, :prompt]], dim=1) for split, part in windows.items()}

    def loss(part: torch.Tensor) -> float:
        return float(plain_nll(halves["prefill"], halves["decode"], layer_map, part, first_token).mean())

    assert report["pair"]["distilled_loss"] == pytest.approx(loss(windows["validation"]), abs=1e-4)
    assert report["pair"]["copying"]["distilled"] == pytest.approx(loss(copying["validation"]), abs=1e-4)
    if heals:
        assert report["pair"]["distilled_loss"] != report["pair"]["pruned_loss"]
    else:
        # Of four windows, one counts a second time with its prompt said again.
        found, on_text, on_copying = (removal["losses"][name] for name in ("decode", "decode_text", "decode_copying"))
        assert on_text == pytest.approx(loss(windows["calibration"]), abs=1e-4)
        assert on_copying == pytest.approx(loss(copying["calibration"][:1]), abs=1e-4)
        assert found == pytest.approx((4 * on_text + on_copying) / 5, abs=1e-6)
        assert report["pair"]["pruned_loss"] == pytest.approx(loss(windows["validation"]), abs=1e-4)
        assert report["pair"]["copying"]["pruned"] == pytest.approx(loss(copying["validation"]), abs=1e-4)
    searched = [(found["half"], found["part"]) for found in removal["parts"]]
    assert searched == [
        *(
            ("decode", part)
            for part, key in (("attention", "remove_attentions"), ("mlp", "remove_mlps"))
            if key in decode
        ),
        *(("prefill", part) for part, key in (("kv_only", "kv_only_blocks"), ("mlp", "remove_mlps")) if key in prefill),
    ]
    assert removal["parts"][-1]["frontier"][-1]["loss"] == removal["losses"]["decode"]


def test_a_stage_begins_without_the_models_of_the_one_before(
    worker: Worker, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model:
        def __init__(self) -> None:
            self.reader = self  # As blocks and what reads them know each other.

    left: list[weakref.ref[Model]] = []
    found: list[Model | None] = []

    def score(context: StageContext) -> Result:
        left.append(weakref.ref(Model()))
        return RESULTS[StageName.SCORING]

    def remove(context: StageContext) -> Result:
        found.append(left[0]())
        return RESULTS[StageName.REMOVAL]

    monkeypatch.setitem(STAGES, StageName.SCORING, score)
    monkeypatch.setitem(STAGES, StageName.REMOVAL, remove)
    job_id = create(worker, tiny_spec(model))
    gc.disable()
    try:
        run_stage(worker, job_id, StageName.SCORING)
        assert left[0]() is not None
        run_stage(worker, job_id, StageName.REMOVAL)
    finally:
        gc.enable()
    assert found == [None]
