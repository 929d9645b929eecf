"""What an estimate says of a search, beside what the search asks for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from pdtrim.contract.spec import JobSpec
from service.checking.estimate import estimate
from service.sources import ModelDescription
from workers.pruning.model.units import Units, blocks_of, deleting
from workers.pruning.search.memo import Memo
from workers.pruning.search.search import SearchResult, search

WINDOWS = 12
SLACK = 2.0
"""An estimate may be so many times what a search takes, and never less than that."""


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


@pytest.mark.parametrize(
    ("blocks", "prefill", "decode", "options"),
    [
        (12, 2, 4, {}),
        (12, 2, 4, {"racing": False, "evaluations": 40}),
        (12, 0, 3, {"algorithm": "greedy", "protect": [0, 11]}),
        (8, 1, 4, {"algorithm": "exhaustive", "force": [3]}),
        (30, 4, 6, {}),
        (32, 8, 8, {"evaluations": 150, "force": [20, 21]}),
        (80, 4, 12, {}),
    ],
)
def test_an_estimate_is_no_less_than_what_a_search_takes_and_not_much_more(
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
    config = {"model_type": "llama", "num_hidden_layers": blocks, "hidden_size": 64, "num_attention_heads": 4}
    told = estimate(spec, ModelDescription(config, None, {"model.safetensors": 10**9}), None).evaluations
    forced = deleting(spec.search.force)
    of_prefill = searched(spec, blocks, forced, max(prefill, len(forced)))
    of_decode = searched(spec, blocks, of_prefill.frontier[max(prefill, len(forced))].units, decode)
    for estimated, result in ((told.prefill, of_prefill), (told.decode, of_decode)):
        taken = sum(effort.sets for effort in result.efforts.values())
        assert taken <= estimated <= SLACK * taken


@pytest.mark.parametrize(("trainable", "gigabytes"), [("all", 62.5), ("lora", 39.6)])
def test_healing_of_eight_billion_weights_is_said_to_fit_80_gigabytes(trainable: str, gigabytes: float) -> None:
    spec = JobSpec.model_validate(
        {
            "model": "hf://a/b",
            "prefill": {"remove_blocks": 4},
            "decode": {"remove_blocks": 6},
            "distillation": {"trainable": trainable},
        }
    )
    config = {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    told = estimate(spec, ModelDescription(config, None, {"model.safetensors": 2 * 8_030_261_248}), None)
    assert told.memory_bytes.search == 2 * 8_030_261_248
    # Dense model, both halves' own weights; of the last, gradients and moments: 2 · 8.03 + 2 · (28 + 26) · 0.218, and
    # 4.03 · 26 · 0.218 where all weights are trained.
    assert told.memory_bytes.distillation == pytest.approx(gigabytes * 1e9, rel=0.002)
