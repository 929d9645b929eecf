"""Healing by adapters of a model that is read from disk at every step, beside healing of one in memory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.whole_jobs import WholeJob
from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import DistillationResult
from pdtrim.contract.spec import JobSpec
from tests.tiny_job import tiny_spec, write_tiny_model
from workers.stages.halves import DECODE, PREFILL

pytestmark = pytest.mark.training
LORA: dict[str, Any] = {
    "heal_tokens": 768,
    "batch_windows": 4,
    "threshold": 1.0,
    "trainable": "lora",
    "lora": {"rank": 2, "alpha": 4},
    "learning_rate": 1e-2,
    "fold": True,
}
STEPS = 768 // (4 * 32)
JOBS: dict[str, dict[str, Any]] = {
    "decode goes on from prefill": {"prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}},
    "prefill is read alone": {
        "prefill": {"kv_only_blocks": 2},
        "decode": {"remove_blocks": 1},
        "serving": {"first_token": "prefill"},
    },
    "both are narrowed, decode more": {
        "prefill": {"remove_blocks": 1, "mlp_width": 0.75},
        "decode": {"remove_blocks": 1, "mlp_width": 0.5},
    },
    "one checkpoint for both": {"prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 1}},
}


def healed(searched: WholeJob, folder: Path, memory_bytes: int | None) -> tuple[DistillationResult, dict[str, Tensor]]:
    """What healing finds and leaves, where it may take so much memory."""
    shutil.copytree(searched.folder, folder)
    job = replace(searched, folder=folder, results=dict(searched.results), memory_bytes=memory_bytes)
    job.run([StageName.DISTILLATION])
    found = job.results[StageName.DISTILLATION]
    assert isinstance(found, DistillationResult)
    artifacts = job.artifacts(StageName.DISTILLATION)
    halves = {name: load_file(artifacts / name) for name in (PREFILL, DECODE)}
    return found, {f"{half}: {name}": tensor for half, of_half in halves.items() for name, tensor in of_half.items()}


@pytest.mark.parametrize("changes", JOBS.values(), ids=JOBS.keys())
def test_a_model_that_does_not_fit_learns_what_one_in_memory_learns(changes: dict[str, Any], tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    spec = JobSpec.model_validate(tiny_spec(model, distillation=LORA, **changes))
    searched = WholeJob(spec, model, [spec.data.text or ""], tmp_path / "searched")
    searched.run([StageName.SCORING, StageName.REMOVAL])
    resident, expected = healed(searched, tmp_path / "resident", None)
    streamed, found = healed(searched, tmp_path / "streamed", 1)
    for one, other in ((streamed.prefill, resident.prefill), (streamed.decode, resident.decode)):
        assert one is not None
        assert one.how is not None
        assert other is not None
        assert other.how is not None
        assert (one.how.way, other.how.way) == ("streamed", "resident")
        assert (one.kept, one.steps) == (other.kept, other.steps)
        assert one.before == pytest.approx(other.before, rel=1e-4)
        assert one.after == pytest.approx(other.after, rel=1e-3)
    assert found.keys() == expected.keys()
    dense = load_file(model / "model.safetensors")
    for name, tensor in expected.items():
        source = dense[name.partition(": ")[2]]
        learned = (tensor - source).norm() if source.shape == tensor.shape else tensor.norm()
        assert (found[name] - tensor).norm() <= 0.02 * learned


def test_progress_moves_with_every_block_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.stages.context.PROGRESS_INTERVAL_S", 0.0)
    said: list[tuple[float, str, dict[str, Any]]] = []

    def publish(progress: float, message: str, figures: Mapping[str, Any]) -> None:
        said.append((progress, message, dict(figures)))

    model = write_tiny_model(tmp_path / "model")
    pair = {"prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}}
    spec = JobSpec.model_validate(tiny_spec(model, distillation=LORA | {"patience": None}, **pair))
    job = WholeJob(spec, model, [spec.data.text or ""], tmp_path / "job", memory_bytes=1)
    job.run([StageName.SCORING, StageName.REMOVAL])
    job.publish = publish
    job.run([StageName.DISTILLATION])

    progress = [one for one, _, _ in said]
    assert progress == sorted(progress)
    assert 0 < progress[0] < 0.02
    assert progress[-1] == pytest.approx(1, abs=0.01)
    assert max(after - before for before, after in pairwise(progress)) < 0.02  # No step of 24 is one leap.
    messages = list(dict.fromkeys(message for _, message, _ in said))
    assert messages == [
        f"{doing} the {state}{half} model{when}."
        for half in ("prefill", "decode")
        for doing, state, when in (
            ("Measuring", "", " before it is healed"),
            ("Healing", "", ""),
            ("Writing and measuring", "healed ", ""),
        )
    ]
    for half in ("prefill", "decode"):
        of_half = [figures for _, _, figures in said if figures["half"] == half]
        assert {figures["step"] for figures in of_half if "step" in figures} == set(range(1, STEPS + 1))
