"""What search and healing compute in, as scoring chooses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import PLAN, SCORES, BlockScores, ComputePrecision
from pdtrim.contract.spec import JobSpec
from tests.search_killed import context, score
from tests.tiny_job import tiny_spec, write_tiny_model
from workers.stages import distillation, halves, precision, removal
from workers.stages.context import StageContext, StoredInput


def scored(folder: Path, **changes: Any) -> StageContext:
    """The surroundings of the search of a tiny job."""
    spec = JobSpec.model_validate(tiny_spec(write_tiny_model(folder / "model"), **changes))
    return context(folder, spec, score(folder, spec))


def chosen(surroundings: StageContext) -> ComputePrecision:
    found = surroundings.read(StageName.SCORING, SCORES, BlockScores).precision
    assert found is not None
    return found


def can_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "GAINING_PARAMETERS", 1)
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)


def test_a_small_model_is_computed_in_float32_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)
    surroundings = scored(tmp_path)
    assert chosen(surroundings) == ComputePrecision(used="float32")
    assert removal.load(surroundings)[0].model.dtype == torch.float32


def test_a_model_of_the_same_loss_is_computed_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    can_gain(monkeypatch)
    surroundings = scored(tmp_path, calibration={"windows": 8, "window_tokens": 64})
    found = chosen(surroundings)
    assert (found.used, found.windows) == ("bfloat16", 8)
    assert found.float32_loss is not None
    assert found.bfloat16_loss not in (None, found.float32_loss)
    assert found.bfloat16_loss == pytest.approx(found.float32_loss, abs=precision.SAME_LOSS)
    assert removal.load(surroundings)[0].model.dtype == torch.bfloat16


def test_a_model_of_another_loss_keeps_to_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    can_gain(monkeypatch)
    monkeypatch.setattr(precision, "SAME_LOSS", 1e-9)
    found = chosen(scored(tmp_path))
    assert (found.used, found.windows) == ("float32", 4)


def test_a_cpu_without_such_instructions_keeps_to_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    can_gain(monkeypatch)
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    assert chosen(scored(tmp_path)) == ComputePrecision(used="float32")


@pytest.mark.training
def test_a_job_in_bfloat16_ends_near_one_in_float32(tmp_path: Path) -> None:
    healing = {"heal_tokens": 1024, "batch_windows": 4, "threshold": 1.0}
    found = {}
    for asked in ("float32", "bfloat16"):
        searched = scored(tmp_path / asked, precision=asked, distillation=healing)
        assert chosen(searched) == ComputePrecision(used=asked)
        searches = removal.run(searched)
        put = searched.store.put_file(f"removal/{PLAN}", searched.out / PLAN)
        plan = {(StageName.REMOVAL, PLAN): StoredInput(f"removal/{PLAN}", put.sha256)}
        healed = context(tmp_path / asked, searched.spec, searched.inputs | plan)
        found[asked] = searches.losses.prefill, distillation.run(healed).prefill
        # Trained weights stay in the precision of the dense model's file.
        trained = load_file(healed.out / halves.PREFILL).values()
        assert {tensor.dtype for tensor in trained} == {torch.float32}
    (exact_loss, exact), (rounded_loss, rounded) = found["float32"], found["bfloat16"]
    assert exact is not None
    assert rounded is not None
    assert rounded_loss != exact_loss
    assert rounded_loss == pytest.approx(exact_loss, abs=0.05)
    assert rounded.after == pytest.approx(exact.after, rel=0.03)
    assert exact.kept == rounded.kept == "distilled"
