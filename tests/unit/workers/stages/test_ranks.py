"""Healing on several devices: processes on this machine's CPU, of which each holds a share of every model."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from pdtrim.contract.results import DistillationResult
from tests.healing_rank import HOLD, HeldFolder
from tests.unit.workers.stages.test_distillation import REMOVED, left, ready
from tests.unit.workers.stages.test_folding import MANY
from workers.inputs.faults import ProcessDied, may_pass
from workers.pruning.repair.training import NonFiniteTraining
from workers.stages import distillation, ranks
from workers.stages.context import StageContext
from workers.stages.healing_folder import Failure, read, write

pytestmark = [pytest.mark.training, pytest.mark.process]
QUICK_RANK = "tests.healing_rank"


def on(devices: int, surroundings: StageContext, *, state: str) -> StageContext:
    """The same attempt on so many devices, with a folder and states of its own."""
    distilled = surroundings.spec.distillation.model_copy(update={"devices": devices})
    spec = surroundings.spec.model_copy(update={"distillation": distilled})
    workdir = surroundings.workdir.parent / f"work-{state}-{devices}"
    return replace(surroundings, spec=spec, workdir=workdir, state_prefix=state)


def losses(found: DistillationResult) -> list[float]:
    assert found.prefill is not None
    assert found.decode is not None
    return [found.prefill.before, found.prefill.after, found.decode.before, found.decode.after]


def folding_errors(found: DistillationResult) -> list[float]:
    """Of each half's gaps, and the losses by which the folds were judged."""
    errors = [
        error for half in found.folds.values() for gap in half.gaps for error in (gap.error_before, gap.error_after)
    ]
    judged = [loss for half in found.folds.values() for loss in (half.before, half.after) if loss is not None]
    return errors + judged


def differ(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((tensor - other[name]).abs().max()) for name, tensor in one.items())


def kill_a_rank(number: int) -> None:
    for process in psutil.Process().children():
        if QUICK_RANK in process.cmdline() and process.environ()["RANK"] == str(number):
            os.kill(process.pid, signal.SIGKILL)


def test_two_processes_heal_as_one_does_and_others_go_on_where_one_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "PROGRAM", QUICK_RANK)
    surroundings = ready(tmp_path, **REMOVED, calibration=MANY, distillation={"fold": True})
    alone = on(1, surroundings, state="alone")
    expected = distillation.run(alone)
    assert folding_errors(expected)
    said: list[dict[str, Any]] = []

    def publish(progress: float, message: str, figures: Mapping[str, Any]) -> None:
        said.append(dict(figures))
        if figures.get("half") == "prefill":
            held.go_on("prefill").touch()

    def check() -> None:
        if (tmp_path / "store/killed/heal-decode.json").exists():
            kill_a_rank(1)

    # A rank dies, and the attempt with it.
    killed = replace(on(2, surroundings, state="killed"), publish=publish, check=check)
    held = HeldFolder(killed.workdir)
    monkeypatch.setenv(HOLD, "1")
    monkeypatch.setattr("workers.stages.context.PROGRESS_INTERVAL_S", 0.0)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(ProcessDied, match="rank 1 of healing was killed by SIGKILL") as died:
        distillation.run(killed)
    assert may_pass(died.value)
    assert not [one for one in psutil.Process().children() if QUICK_RANK in one.cmdline()]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert {"prefill", "decode"} <= {figures.get("half") for figures in said}

    # The next goes on from its state, on one device or on several.
    monkeypatch.delenv(HOLD)
    for devices in (1, 2):
        steps: list[tuple[str, int]] = []

        def note(progress: float, message: str, figures: Mapping[str, Any], steps: Any = steps) -> None:
            if "step" in figures:
                steps.append((figures["half"], figures["step"]))

        shutil.copytree(tmp_path / "store/killed", tmp_path / f"store/again-{devices}")
        again = replace(on(devices, surroundings, state=f"again-{devices}"), publish=note)
        found = distillation.run(again)
        assert losses(found) == pytest.approx(losses(expected), rel=1e-3)
        assert folding_errors(found) == pytest.approx(folding_errors(expected), rel=1e-4)
        assert {half: one.kept for half, one in found.folds.items()} == {"prefill": "folded", "decode": "folded"}
        assert differ(left(again), left(alone)) < 1e-3
        assert ("decode", 1) not in steps
        assert all(half == "decode" for half, _ in steps)
        assert found.decode is not None
        assert found.decode.how is not None
        assert found.decode.how.devices == devices


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (NonFiniteTraining("the training loss is nan at step 3"), ValueError, "the training loss is nan at step 3"),
        (torch.OutOfMemoryError("CUDA out of memory"), MemoryError, "CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError, "DefaultCPUAllocator"),
        (OSError(errno.ENOSPC, "No space left on device"), OSError, "No space left on device"),
        (KeyError("a tensor"), RuntimeError, "KeyError: 'a tensor'"),
    ],
)
def test_the_stage_raises_in_place_of_a_rank_what_it_tells_apart(
    raised: Exception, kind: type[Exception], said: str, tmp_path: Path
) -> None:
    write(tmp_path / "failed-0.json", Failure.of(raised))
    failure = read(tmp_path / "failed-0.json", Failure)
    assert failure is not None
    error = failure.error()
    assert type(error) is kind
    assert said in str(error)
    assert may_pass(error) == may_pass(raised)
