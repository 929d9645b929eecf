"""The stage by itself: how it heals where not all fits the device, and how it goes on after an interruption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pdtrim.contract.healing_memory import HealingSize, HealingWay
from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import PLAN
from pdtrim.contract.spec import JobSpec
from tests.search_killed import context, score
from tests.tiny_job import tiny_spec, write_tiny_model
from workers.stages import distillation, removal, training
from workers.stages.context import StageContext, StoredInput

pytestmark = pytest.mark.training

IN_BFLOAT16 = HealingWay("bfloat16", recomputed=True, parts=2)
KEYS_AND_VALUES: dict[str, Any] = {"prefill": {"kv_only_blocks": 2}, "decode": {"remove_blocks": 1}}
REMOVED: dict[str, Any] = {"prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}}


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
        for name in (distillation.PREFILL, distillation.DECODE)
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
    surroundings = ready(tmp_path, **given_up, distillation={"trainable": trainable})
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
    class Stopped(Exception):
        pass

    surroundings = ready(tmp_path, **REMOVED)
    if way is not None:
        healed_in(monkeypatch, way)
    monkeypatch.setattr(training, "SAVE_INTERVAL_S", 0.0)
    expected = distillation.run(surroundings)
    unbroken = left(surroundings)

    stopped = replace(surroundings, state_prefix="stopped")
    kept = tmp_path / "store" / "stopped"

    def say(progress: float, message: str, **figures: Any) -> None:
        if figures["half"] == "decode" and figures["step"] >= 3 and len(list(kept.glob("*"))) == 2:
            raise Stopped

    monkeypatch.setattr(stopped, "say", say)
    with pytest.raises(Stopped):
        distillation.run(stopped)
    assert sorted(path.name for path in kept.iterdir()) == ["heal-decode.safetensors", "heal-prefill.safetensors"]
    # Whatever this one would choose: it goes on as that one began.
    if way is not None:
        healed_in(monkeypatch, HealingWay("float32", recomputed=False, parts=1))
    again = replace(surroundings, state_prefix="stopped")
    assert distillation.run(again) == expected
    resumed = left(again)
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())
