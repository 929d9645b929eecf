"""What an estimate says of a search, beside what the search asks for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pdtrim.contract.devices import Device
from pdtrim.contract.estimate import Estimate
from pdtrim.contract.jobs import StageName
from pdtrim.contract.spec import JobSpec
from service.checking.estimate import Earlier, estimate
from service.checking.placement import ASSUMED, placed
from service.checking.sets import searches
from service.sources import ModelDescription
from workers.pruning.model.units import Units, blocks_of, deleting
from workers.pruning.search.memo import Memo
from workers.pruning.search.search import SearchResult, search

WINDOWS = 12
EIGHT_BILLION = ModelDescription(
    {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    None,
    {"model.safetensors": 2 * 8_030_261_248},
)


def estimated(spec: JobSpec, model: ModelDescription, *devices: Device, earlier: Earlier | None = None) -> Estimate:
    """With a queue `default` and a queue `large`."""
    return estimate(spec, model, placed(spec, model, devices, ["default", "large"]), earlier)


def interacting(candidates: Sequence[Units], windows: range) -> dict[Units, list[float]]:
    """Losses in which blocks interact, so that greedy's sets are not the best, on windows that differ."""
    return {units: [_loss(sorted(blocks_of(units)), window) for window in windows] for units in candidates}


def _loss(removed: list[int], window: int) -> float:
    cost = 0.1 * len(removed) ** 2 + sum(random.Random(block).random() for block in removed)
    cost += sum(random.Random(f"{one} {other}").gauss(0.0, 0.3) for one in removed for other in removed if one < other)
    return 10.0 + cost + random.Random(window).random() + 0.05 * random.Random(f"{removed} {window}").random()


def searched(spec: JobSpec, blocks: int, base: Units, remove: int) -> SearchResult:
    """The search of a half, as a worker begins it."""
    return search(
        Memo(interacting, WINDOWS, racing=spec.search.racing),
        algorithm=spec.search.algorithm,
        num_blocks=blocks,
        remove=remove,
        base=base,
        protect=frozenset(spec.search.protect),
        scores=[random.Random(block).random() for block in range(blocks)],
        evaluations=spec.search.annealing_budget(blocks),
        seed=spec.seed,
        on_progress=lambda done, best: None,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blocks", "prefill", "decode", "options"),
    [
        (12, 2, 4, {}),
        (12, 2, 4, {"racing": False, "evaluations": 40}),
        (12, 0, 3, {"algorithm": "greedy", "protect": [0, 11]}),
        (30, 3, 9, {"algorithm": "greedy"}),
        (30, 9, 12, {"force": [4, 5]}),
        (8, 1, 4, {"algorithm": "exhaustive", "force": [3]}),
        (30, 4, 6, {}),
        (32, 8, 8, {"evaluations": 150, "force": [20, 21]}),
        (80, 4, 12, {}),
    ],
)
def test_a_search_compares_as_many_sets_as_estimated(
    blocks: int, prefill: int, decode: int, options: dict[str, Any]
) -> None:
    spec = JobSpec.model_validate(
        {
            "model": "hf://a/b",
            "prefill": {"remove_blocks": prefill},
            "decode": {"remove_blocks": decode},
            "search": options,
        }
    )
    told = searches(spec, blocks, None)
    forced = deleting(spec.search.force)
    of_prefill = searched(spec, blocks, forced, max(prefill, len(forced)))
    of_decode = searched(spec, blocks, of_prefill.frontier[max(prefill, len(forced))].units, decode)
    for estimated, result in ((told.prefill, of_prefill), (told.decode, of_decode)):
        taken = sum(effort.sets for effort in result.efforts.values())
        assert estimated.least <= taken <= estimated.most
        exact = spec.search.algorithm != "annealing" or spec.search.annealing_budget(blocks) < 30 * (
            len(result.frontier) - 3
        )
        assert (estimated.least == estimated.most) or not exact


@pytest.mark.parametrize(
    ("trainable", "way"),
    [
        ("all", "bfloat16, moments of 8 bits, blocks computed again"),
        ("lora", "float32, blocks computed again, batches in 4 parts"),
    ],
)
def test_healing_of_eight_billion_weights_is_said_to_fit_80_gigabytes(trainable: str, way: str) -> None:
    spec = JobSpec.model_validate(
        {
            "model": "hf://a/b",
            "prefill": {"remove_blocks": 4},
            "decode": {"remove_blocks": 6},
            "calibration": {"window_tokens": 1024},
            "distillation": {"trainable": trainable},
        }
    )
    told = estimated(spec, EIGHT_BILLION)
    assert told.dense.parameters == 8_030_261_248
    # 32 blocks of 218,112,000 are all but the embeddings, the head and the last norm.
    assert told.checkpoints[1].parameters == 8_030_261_248 - 6 * 218_112_000
    by_stage = {stage.stage: stage for stage in told.stages}
    assert by_stage[StageName.DISTILLATION].way == way
    assert all(stage.fits and stage.memory_bytes < 80e9 for stage in told.stages)


def finished(name: StageName, seconds: float) -> Any:
    """A stage that took so long, and found nothing that matters here."""
    began = datetime(2026, 1, 2, tzinfo=UTC)
    return {
        "name": name,
        "status": "succeeded",
        "progress": 1.0,
        "attempt": 1,
        "started_at": began,
        "finished_at": began + timedelta(seconds=seconds),
    }


def test_an_earlier_jobs_seconds_are_scaled_by_the_work_of_this_one() -> None:
    small = JobSpec.model_validate(
        {
            "model": "hf://a/b",
            "prefill": {"remove_blocks": 1},
            "decode": {"remove_blocks": 1},
            "search": {"algorithm": "greedy"},
            "calibration": {"windows": 16},
            "distillation": {"heal_tokens": 1_048_576},
        }
    )
    large = small.model_copy(
        update={
            "calibration": small.calibration.model_copy(update={"windows": 64}),
            "distillation": small.distillation.model_copy(update={"heal_tokens": 30 * 1_048_576}),
        }
    )
    earlier = ("job_1", small, [finished(StageName.REMOVAL, 100.0), finished(StageName.DISTILLATION, 100.0)])
    same, more = (estimated(spec, EIGHT_BILLION, earlier=earlier).earlier for spec in (small, large))
    assert same is not None
    assert more is not None
    assert set(same.seconds.values()) == {100.0}
    assert 200 < more.seconds[StageName.REMOVAL] < 500
    assert 1500 < more.seconds[StageName.DISTILLATION] < 3000


def test_sets_that_are_compared_folded_take_longer_and_more_memory_but_are_as_many() -> None:
    job = {"model": "hf://a/b", "prefill": {"remove_blocks": 4}, "decode": {"remove_blocks": 6}}
    told = [
        estimated(JobSpec.model_validate(job | {"search": {"algorithm": "greedy", "folded": folded}}), EIGHT_BILLION)
        for folded in (False, True)
    ]
    plain, compared_folded = (next(s for s in one.stages if s.stage is StageName.REMOVAL) for one in told)
    assert told[0].evaluations == told[1].evaluations
    assert 1.3 * plain.flops < compared_folded.flops < 6 * plain.flops
    # The dense model's states behind 32 blocks, of 4 · 4,096 tokens of 4,096 numbers in bfloat16: 4.3 GB.
    more = compared_folded.memory_bytes - plain.memory_bytes
    assert 4.3e9 < more < 9e9


def test_every_token_of_a_sample_takes_a_pass_over_the_weights_of_the_dense_model_and_of_what_is_served() -> None:
    job = {"model": "hf://a/b", "prefill": {"remove_blocks": 8}, "decode": {"remove_blocks": 8}}
    resident = {"kind": "cpu", "memory_bytes": 128 * 2**30, "bfloat16_flops": None}
    device = ASSUMED.model_copy(update={"queue": "default", "bytes_per_second": 64e9, "call_seconds": 0.0, **resident})

    def seconds(**evaluation: object) -> float:
        spec = JobSpec.model_validate(job | {"evaluation": evaluation})
        told = estimate(spec, EIGHT_BILLION, placed(spec, EIGHT_BILLION, [device], ["default"]), None)
        (found,) = [one.seconds for one in told.stages if one.stage is StageName.EVALUATION]
        assert found is not None
        return found

    without = seconds(prompts=[])
    by_token = 4 * (8_030_261_248 + 8_030_261_248 - 8 * 218_112_000) / 64e9
    # The beginnings of windows are of one length, and go on together; texts that are given are not.
    assert seconds(sample_tokens=10) - without == pytest.approx(10 * by_token, abs=1)
    assert seconds(sample_tokens=10, prompts=["a", "b", "c"]) - without == pytest.approx(30 * by_token, abs=1)
