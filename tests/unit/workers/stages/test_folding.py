"""The distillation stage: what it folds into the weights before it trains, or instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.whole_jobs import UP_TO_EXPORT, WholeJob
from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import PLAN, DistillationResult, Plan
from pdtrim.contract.spec import JobSpec
from tests.tiny_job import tiny_spec, write_tiny_model
from tests.unit.workers.stages.test_distillation import REMOVED, left, ready
from workers.pruning.model.parts import pruned
from workers.pruning.model.plan import BlockPlan
from workers.pruning.repair.distill import load_tensors
from workers.pruning.repair.fold import fold
from workers.stages import distillation, folding, halves
from workers.stages.context import StageContext
from workers.stages.removal import Plans, block_plan

pytestmark = pytest.mark.training

LINEAR = ("down_proj.weight",)
MANY = {"windows": 40, "window_tokens": 32}


def ran(folder: Path, **changes: Any) -> tuple[StageContext, DistillationResult]:
    surroundings = ready(folder, **changes)
    return surroundings, distillation.run(surroundings)


def test_without_training_folded_weights_are_kept_where_they_help(tmp_path: Path) -> None:
    surroundings, found = ran(tmp_path, **REMOVED, calibration=MANY, distillation={"heal_tokens": 0})
    assert found.prefill is found.decode is None
    for folded, name in ((found.folds["prefill"], halves.PREFILL), (found.folds["decode"], halves.DECODE)):
        assert folded.before is not None
        assert folded.after is not None
        kept = load_file(surroundings.out / name)
        assert (folded.kept == "folded") == (folded.after < folded.before)
        assert all(tensor.endswith(LINEAR) for tensor in kept)
    assert found.folds["prefill"].kept == "folded"
    assert load_file(surroundings.out / halves.PREFILL)


def test_folded_weights_that_do_harm_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def harmful(*given: Any, **named: Any) -> Any:
        made = fold(*given, **named)
        return type(made)({name: -9 * tensor for name, tensor in made.tensors.items()}, made.errors, made.left_out)

    monkeypatch.setattr(folding, "fold", harmful)
    surroundings, found = ran(tmp_path, **REMOVED, calibration=MANY, distillation={"heal_tokens": 0})
    assert found.folds["prefill"].kept == found.folds["decode"].kept == "unfolded"
    assert left(surroundings) == {}


def test_healing_starts_from_the_folded_weights(tmp_path: Path) -> None:
    _, plain = ran(tmp_path / "plain", **REMOVED)
    _, found = ran(tmp_path / "folded", **REMOVED, distillation={"fold": True})
    assert plain.folds == {}
    assert plain.prefill is not None
    assert found.prefill is not None
    assert found.folds["prefill"].kept == "folded"
    assert found.prefill.before < plain.prefill.before


def test_what_was_chosen_for_its_folds_is_folded_before_healing(tmp_path: Path) -> None:
    _, found = ran(tmp_path / "folded", **REMOVED, search={"folded": True})
    assert found.folds.keys() == {"prefill", "decode"}
    _, found = ran(tmp_path / "not", **REMOVED, search={"folded": True}, distillation={"fold": False})
    assert found.folds == {}


def test_nothing_is_folded_where_neither_training_nor_a_fold_is_asked_for(tmp_path: Path) -> None:
    surroundings, found = ran(tmp_path, **REMOVED, calibration=MANY, distillation={"heal_tokens": 0, "fold": False})
    assert found.folds == {}
    assert left(surroundings) == {}


def test_training_in_vain_leaves_the_folded_weights(tmp_path: Path) -> None:
    surroundings, found = ran(tmp_path, **REMOVED, distillation={"fold": True, "learning_rate": 1.0})
    assert found.prefill is not None
    assert found.prefill.kept == "undistilled"
    assert found.folds["prefill"].kept == "folded"
    folded = load_file(surroundings.out / halves.PREFILL)
    assert folded
    assert all(name.endswith(LINEAR) for name in folded)


def test_a_model_pruned_by_others_keeps_its_weights_when_nothing_is_repaired(tmp_path: Path) -> None:
    surroundings, found = ran(tmp_path, **REMOVED, distillation={"enabled": False})
    assert found.folds == {}
    assert left(surroundings) == {}


def test_plain_transformers_computes_the_folded_model_from_its_checkpoint(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    changes: dict[str, Any] = {"calibration": MANY, "distillation": {"heal_tokens": 0}, **REMOVED}
    spec = JobSpec.model_validate(tiny_spec(model, **changes))
    job = WholeJob(spec, model, [spec.data.text or ""], tmp_path / "job")
    job.run(UP_TO_EXPORT)
    plan = Plan.model_validate_json((job.artifacts(StageName.REMOVAL) / PLAN).read_bytes())
    ids = torch.arange(1, 41).view(2, 20)
    for half, name in ((plan.prefill, "prefill"), (plan.decode, "decode")):
        weights = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        folded = load_file(job.artifacts(StageName.DISTILLATION) / f"{name}.safetensors")
        assert folded
        plain = AutoModelForCausalLM.from_pretrained(job.artifacts(StageName.EXPORT) / name, dtype=torch.float32)
        unfolded = pruned(weights, block_plan(half))(input_ids=ids).logits.detach()
        load_tensors(weights, folded)
        with torch.no_grad():
            expected = pruned(weights, block_plan(half))(input_ids=ids).logits
            found = plain(input_ids=ids).logits
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        assert (found - unfolded).abs().max() > 1e-2 * expected.abs().max()


def test_what_is_left_out_is_said_of_every_half_with_gaps() -> None:
    one, more = BlockPlan(5, frozenset({2})), BlockPlan(5, frozenset({2, 3}))
    found = folding.none_folded(Plans(one, more), folding.TOO_LARGE)
    assert [(gap.first, gap.last) for gap in found["decode"].left_out] == [(2, 3)]
    assert found["prefill"].left_out[0].reason == folding.TOO_LARGE
    assert folding.none_folded(Plans(BlockPlan(5), one), folding.TOO_LARGE).keys() == {"decode"}


@pytest.mark.parametrize(
    ("fold", "gone", "windows", "reason", "said"),
    [
        (True, {2}, 2, None, None),
        (False, {2}, 2, None, []),
        (True, set(), 2, None, []),
        (True, {2}, 1, None, [folding.TOO_LITTLE]),
        (True, {2}, 2, folding.STACKED, [folding.STACKED]),
    ],
)
def test_why_nothing_of_a_half_is_folded_is_said(
    fold: bool, gone: set[int], windows: int, reason: str | None, said: list[str] | None, tmp_path: Path
) -> None:
    spec = JobSpec.model_validate(tiny_spec(tmp_path, distillation={"fold": fold}))
    ids = torch.zeros(windows, 32, dtype=torch.long)
    found = folding.left_unfolded(spec, BlockPlan(5, frozenset(gone)), ids, reason=reason)
    gaps = found.found.left_out if found is not None and found.found is not None else []
    assert (found is None) == (said is None)
    assert [gap.reason for gap in gaps] == (said or [])


def test_windows_to_fold_on_leave_out_those_that_judge() -> None:
    training, calibration = torch.arange(6).view(3, 2), torch.arange(100, 120).view(10, 2)
    windows = folding.fold_windows(training, calibration, 8)
    assert windows.tolist() == [[0, 1], [2, 3], [4, 5], [116, 117], [118, 119]]


def test_folds_are_judged_on_prompts_that_are_said_again_as_well(tmp_path: Path) -> None:
    surroundings = ready(tmp_path, calibration={"windows": 4, "window_tokens": 32, "copying": 0.5})
    found = folding.copied(surroundings, torch.arange(16).view(4, 4))
    assert found.tolist() == [[0, 1, 0, 1], [4, 5, 4, 5]]
