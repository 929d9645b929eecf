"""The stage by itself: how it heals where not all fits the device, and how it goes on after an interruption."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pdtrim.contract.healing_memory import HealingSize, HealingWay
from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import PLAN
from pdtrim.contract.results.distillation import OwnAnswers
from pdtrim.contract.spec import JobSpec
from tests.search_killed import context, score
from tests.tiny_job import tiny_spec, write_tiny_model
from workers.pruning.repair.answers import marked, unmarked
from workers.pruning.repair.targets import computed
from workers.stages import distillation, halves, removal, targets, training
from workers.stages.context import StageContext, StoredInput
from workers.stages.scoring import WINDOWS

pytestmark = pytest.mark.training

LITTLE = 2e-4
"""A learning rate at which few steps do no harm to a model of random weights, adapters or not."""
IN_BFLOAT16 = HealingWay("bfloat16", recomputed=True, parts=2)
KEYS_AND_VALUES: dict[str, Any] = {"prefill": {"kv_only_blocks": 2}, "decode": {"remove_blocks": 1}}
REMOVED: dict[str, Any] = {"prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}}


class Stopped(Exception):
    pass


def ready(folder: Path, **changes: Any) -> StageContext:
    """The surroundings of the distillation of a tiny job whose search is done."""
    healing = {"heal_tokens": 1024, "batch_windows": 4, "threshold": 1.0, **changes.pop("distillation", {})}
    model = write_tiny_model(folder / "model")
    spec = JobSpec.model_validate(tiny_spec(model, distillation=healing, **changes))
    inputs = score(folder, spec)
    searched = context(folder, spec, inputs)
    removal.run(searched)
    put = searched.store.put_file(f"removal/{PLAN}", searched.out / PLAN)
    return context(folder, spec, {**inputs, (StageName.REMOVAL, PLAN): StoredInput(f"removal/{PLAN}", put.sha256)})


def left(surroundings: StageContext) -> dict[str, Tensor]:
    return {
        f"{name}: {tensor}": value
        for name in (halves.PREFILL, halves.DECODE)
        for tensor, value in load_file(surroundings.out / name).items()
    }


def healed_in(monkeypatch: pytest.MonkeyPatch, way: HealingWay) -> None:
    def chosen(size: HealingSize, asked: HealingWay, free_bytes: int) -> HealingWay:
        return way

    monkeypatch.setattr(distillation, "healing_way", chosen)


@pytest.mark.parametrize("given_up", [REMOVED, KEYS_AND_VALUES], ids=["blocks", "all-but-keys-and-values"])
@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_healing_in_bfloat16_comes_near_healing_in_float32(
    given_up: dict[str, Any], trainable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surroundings = ready(tmp_path, **given_up, distillation={"trainable": trainable, "learning_rate": LITTLE})
    exact = distillation.run(surroundings)
    healed_in(monkeypatch, IN_BFLOAT16)
    rough = distillation.run(replace(surroundings, state_prefix="another"))
    for one, other in ((rough.prefill, exact.prefill), (rough.decode, exact.decode)):
        assert one is not None
        assert one.how is not None
        assert other is not None
        assert other.how is not None
        assert (other.how.precision, other.how.gradient_checkpointing) == ("float32", False)
        assert (one.how.precision, one.how.gradient_accumulation) == ("bfloat16", 2)
        assert one.how.moments == ("8-bit" if trainable == "all" else "float32")
        assert one.kept == other.kept == "distilled"
        assert one.after == pytest.approx(other.after, rel=0.03)


@pytest.mark.parametrize("way", [None, IN_BFLOAT16], ids=["as-asked", "in-bfloat16"])
def test_an_attempt_that_was_stopped_is_gone_on_with_to_the_same_bits(
    way: HealingWay | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surroundings = ready(tmp_path, **REMOVED)
    if way is not None:
        healed_in(monkeypatch, way)
    monkeypatch.setattr(training, "SAVE_INTERVAL_S", 0.0)
    expected = distillation.run(surroundings)
    unbroken = left(surroundings)

    stopped = replace(surroundings, state_prefix="stopped")
    kept = tmp_path / "store" / "stopped"

    def say(progress: float, message: str, **figures: Any) -> None:
        if figures["half"] == "decode" and figures.get("step", 0) >= 3 and len(list(kept.glob("heal-*"))) == 2:
            raise Stopped

    monkeypatch.setattr(stopped, "say", say)
    with pytest.raises(Stopped):
        distillation.run(stopped)
    assert sorted(path.name for path in kept.glob("*.safetensors")) == [
        "heal-decode.safetensors",
        "heal-prefill.safetensors",
    ]
    # Whatever this one would choose: it goes on as that one began.
    if way is not None:
        healed_in(monkeypatch, HealingWay("float32", recomputed=False, parts=1))
    again = replace(surroundings, state_prefix="stopped")
    assert distillation.run(again) == expected
    resumed = left(again)
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())


def without_room_for_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "keeps_targets", lambda beside, ahead, asked, free_bytes: True)


@pytest.mark.parametrize(
    "changes",
    [
        {"distillation": {"trainable": "all"}},
        {"distillation": {"trainable": "lora", "learning_rate": LITTLE}},
        {"distillation": {"trainable": "all", "losses": {"hidden": 0}}},
        {"decode": {"remove_blocks": 1}},
        {"prefill": {"remove_blocks": 0}},
    ],
    ids=["all", "lora", "words-alone", "unified", "decode-alone"],
)
def test_healing_on_kept_targets_comes_near_healing_beside_the_dense_model(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surroundings = ready(tmp_path, **{**REMOVED, **changes})
    expected = distillation.run(surroundings)
    without_room_for_the_dense_model(monkeypatch)
    found = distillation.run(replace(surroundings, state_prefix="another", workdir=tmp_path / "another"))
    for one, other in ((found.prefill, expected.prefill), (found.decode, expected.decode)):
        assert (one is None) == (other is None)
        if one is None or other is None:
            continue
        assert one.how is not None
        assert other.how is not None
        assert (other.how.targets, other.how.target_bytes) == ("computed", 0)
        assert one.how.targets == "kept"
        assert one.how.target_bytes > 0
        assert one.kept == other.kept == "distilled"
        assert (one.before, one.after) == pytest.approx((other.before, other.after), rel=0.02)


def test_an_attempt_goes_on_from_the_targets_that_another_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_room_for_the_dense_model(monkeypatch)
    monkeypatch.setattr("workers.pruning.repair.targets.GROUP_BYTES", 1)  # a window a file
    surroundings = ready(tmp_path, **REMOVED)
    expected = distillation.run(surroundings)
    unbroken = left(surroundings)

    groups: list[int] = []
    compute, kept_in = computed, tmp_path / "store" / "stopped" / "targets"

    def counted(model: Any, windows: Tensor, *further: Any) -> dict[str, Tensor]:
        if len(groups) == 3:
            until = time.monotonic() + 30
            while len(list(kept_in.glob("*.safetensors"))) < 3 and time.monotonic() < until:
                time.sleep(0.02)
            raise Stopped
        groups.append(len(windows))
        return compute(model, windows, *further)

    monkeypatch.setattr(targets, "computed", counted)
    with pytest.raises(Stopped):
        distillation.run(replace(surroundings, state_prefix="stopped", workdir=tmp_path / "stopped"))
    groups.clear()
    kept = len(list(kept_in.iterdir()))
    assert kept == 3

    def not_again(model: Any, windows: Tensor, *further: Any) -> dict[str, Tensor]:
        groups.append(len(windows))
        return compute(model, windows, *further)

    monkeypatch.setattr(targets, "computed", not_again)
    again = replace(surroundings, state_prefix="stopped", workdir=tmp_path / "again")
    assert distillation.run(again) == expected
    every = len(list(kept_in.iterdir()))
    assert len(groups) == every - kept
    resumed = left(again)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())


def test_weights_are_kept_as_stored_where_that_loses_nothing() -> None:
    exact, wider = torch.tensor([1.0, -0.5]), torch.tensor([1.0, 1.0 + 2**-12])
    assert distillation.as_stored(exact, torch.bfloat16).dtype == torch.bfloat16
    assert distillation.as_stored(wider, torch.bfloat16).equal(wider)


def test_what_is_held_out_of_own_answers_is_of_all_parts_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answered(context: StageContext, model: Any, windows: int) -> tuple[Tensor, OwnAnswers]:
        ids = torch.arange(windows)[:, None].expand(-1, 32)
        return marked(ids, torch.ones_like(ids, dtype=torch.bool)), OwnAnswers(prompts=1, answers=1, tokens=1)

    monkeypatch.setattr(distillation, "answered_windows", answered)
    surroundings = ready(tmp_path, distillation={"data": "self", "heal_tokens": 2048})
    windows = load_file(surroundings.input(StageName.SCORING, WINDOWS))
    data, _ = distillation.training_windows(surroundings, windows, Mock())
    held_out, trained = (unmarked(ids)[0][:, 0].tolist() for ids in (data.held_out, data.training))
    assert sorted(held_out + trained) == list(range(len(held_out) + len(trained)))
    assert max(held_out) > len(trained) / 2


@pytest.mark.parametrize(
    ("distilled", "rate"),
    [({}, 2e-4), ({"trainable": "lora"}, 2e-3), ({"trainable": "lora", "learning_rate": 1e-4}, 1e-4)],
)
def test_adapters_have_a_rate_of_their_own_unless_a_job_says_one(
    distilled: dict[str, Any], rate: float, tmp_path: Path
) -> None:
    spec = JobSpec.model_validate(tiny_spec(tmp_path, distillation=distilled))
    surroundings = Mock()
    surroundings.spec = spec
    found = training.settings(surroundings, training.asked_way(spec.distillation), 32)
    assert found.learning_rate == rate
