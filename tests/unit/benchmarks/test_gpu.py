"""The script for machines with a GPU: all of it at toy size on the CPU, and what it makes of failures."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks import gpu
from benchmarks.device.bench import CPU, ON_CPU, SIZES, TF32_TOLERANCE, Bench, Place
from benchmarks.device.findings import Findings, Spread, Table
from benchmarks.device.llama import nested, one_round
from benchmarks.device.walks import largest_difference, walk
from tests.unit.workers.pruning.devices import FIRST, accelerators
from workers.pruning.model.units import deleting

pytestmark = pytest.mark.training

SCRIPT = Path(gpu.__file__)
MISSING = ["alembic", "boto3", "celery", "datasets", "fastapi", "matplotlib", "pydantic", "redis", "rich", "service"]
MISSING += ["sqlalchemy", "sqlmodel", "structlog", "tenacity", "typer", "uvicorn"]
"""Packages that a machine with a GPU need not have; those that transformers and accelerate bring are there."""
TOY = ["--device", "cpu", "--size", "toy"]


def test_every_part_runs_on_a_machine_that_has_torch_and_transformers_alone(tmp_path: Path) -> None:
    start = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({MISSING}))
sys.argv[1:] = {[*TOY, "--out", str(tmp_path / "out")]}
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    run = subprocess.run(
        [sys.executable, "-c", start],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert found["machine"]["torch"] == torch.__version__
    assert list(found["parts"]) == list(gpu.PARTS)
    for part in found["parts"].values():
        assert not part["failures"]
        assert all(table["rows"] for table in part["tables"])
    assert run.stdout.strip() == (tmp_path / "out" / "gpu.md").read_text().strip()


def test_a_part_that_raises_is_reported_and_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(bench: Bench) -> Findings:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "PARTS", {"walk": broken, "round": one_round})
    assert gpu.main([*TOY, "--out", str(tmp_path)]) == 1
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert "no such kernel" in parts["walk"]["failures"][0]
    assert not parts["round"]["failures"]
    assert "no such kernel" in capsys.readouterr().out
    assert gpu.main([*TOY, "round"]) == 0


def test_a_part_that_does_not_exist_is_refused_with_those_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main([*TOY, "walk", "sprint"])
    assert "there is no part 'sprint'; the parts are walk, search" in capsys.readouterr().err


def test_a_device_that_computes_something_else_fails_the_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    load: Callable[[Place], PreTrainedModel] = Place.load

    def off(place: Place) -> PreTrainedModel:
        model = load(place)
        if place.name != ON_CPU.name:
            model.model.layers[3].mlp.down_proj.weight.mul_(1.5)
        return model

    monkeypatch.setattr(Place, "load", off)
    failures = walk(Bench(CPU, SIZES["toy"])).failures
    assert any("float32, cross-entropy, from the CPU" in failure for failure in failures)
    assert any("blocks read from disk one at a time" in failure for failure in failures)


@pytest.mark.parametrize("part", ["search", "export", "round"])
def test_no_part_mixes_tensors_of_the_device_with_those_of_the_cpu(part: str) -> None:
    bench = Bench(FIRST, SIZES["toy"])
    with accelerators():
        assert gpu.examined(gpu.PARTS[part], bench).failures == []


def test_a_difference_that_is_not_a_number_is_a_failure() -> None:
    one, two = deleting({1}), deleting({2})
    difference = largest_difference({one: math.nan, two: 2.0}, {one: 1.0, two: 1.0})
    findings = Findings()
    findings.judge("losses", difference, 3.0)
    findings.judge("on the edge", 3.0, 3.0)
    findings.judge("over it", 3.1, 3.0)
    assert findings.failures == ["losses: nan, where 3 is allowed", "over it: 3.1, where 3 is allowed"]


def test_a_table_shows_medians_ranges_and_what_was_not_measured() -> None:
    table = Table("Times:", {"": "", "ms": ".1f", "GB": ".2f"})
    table.add("dense", Spread.of([3.0, 1.0, 8.0]), None)
    assert table.markdown() == "Times:\n\n|  | ms | GB |\n|---|---|---|\n| dense | 3.0 (1.0–8.0) | – |"


def test_tensorfloat_lasts_as_long_as_it_is_measured() -> None:
    before = torch.get_float32_matmul_precision()
    with Place("TF32", CPU, torch.float32, TF32_TOLERANCE, tf32=True).numbers():
        assert torch.get_float32_matmul_precision() == "high"
        with ON_CPU.numbers():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(("blocks", "prefill", "decode"), [(32, 4, 8), (6, 1, 2), (30, 3, 5)])
def test_the_pair_that_is_timed_is_nested(blocks: int, prefill: int, decode: int) -> None:
    gone_from_prefill, gone_from_decode = nested(blocks, prefill, decode)
    assert gone_from_prefill < gone_from_decode < frozenset(range(blocks))
    assert (len(gone_from_prefill), len(gone_from_decode)) == (prefill, decode)
