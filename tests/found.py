"""What the stages of a job on six blocks find, as models; each takes changes of its fields."""

from __future__ import annotations

from typing import Any

from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import (
    DistillationResult,
    EvaluationResult,
    ExportResult,
    ModelFigures,
    PairFigures,
    Plan,
    RemovalResult,
    Result,
    ScoringResult,
    TokenRuleFigures,
)

BLOCKS = 6


def model_figures(**changes: Any) -> ModelFigures:
    """Of a model that gave up nothing."""
    figures: dict[str, Any] = {
        "blocks": BLOCKS,
        "kept_blocks": list(range(BLOCKS)),
        "deleted_blocks": [],
        "distilled_blocks": {},
        "parameters": 1000,
        "bytes": 1 << 20,
        "perplexity": {"value": 20.0, "standard_error": 1.0},
        "kl_to_dense": 0.0,
        "top1_agreement": 1.0,
        "undistilled_perplexity": None,
        "prefill_tokens_per_second": 4000.0,
        "decode_tokens_per_second": 150.0,
        "time_to_first_token_ms": 30.0,
        "inter_token_latency_ms": 6.0,
    }
    return ModelFigures.model_validate(figures | changes)


def token_rule_figures(**changes: Any) -> TokenRuleFigures:
    """Of a rule that sends a quarter."""
    figures: dict[str, Any] = {
        "rule": {"first": 4, "last": 8, "layers": [1]},
        "loss": 3.25,
        "bytes_sent": 1024,
        "ratio": 4.0,
        "ratio_asked": 4.0,
        "ratio_reached": True,
    }
    return TokenRuleFigures.model_validate(figures | changes)


def pair_figures(**changes: Any) -> PairFigures:
    """Of a pair that loses half of what pruning costs again to distillation."""
    figures: dict[str, Any] = {
        "prompt_tokens": 128,
        "continuation_tokens": 128,
        "dense_loss": 3.0,
        "pruned_loss": 3.5,
        "distilled_loss": 3.2,
        "first_token": "decode",
        "first_token_losses": {
            "dense": {"decode": 2.0, "prefill": 2.0},
            "pruned": {"decode": 2.75, "prefill": 2.5},
            "distilled": {"decode": 2.25, "prefill": 2.125},
        },
        "kv_layer_map": [0, 1],
        "kv_bytes_per_request": {"tokens": 256, "dense": 8192, "pruned": 4096, "dense_sent": 4096, "sent": 2048},
    }
    return PairFigures.model_validate(figures | changes)


def evaluation(**changes: Any) -> EvaluationResult:
    """Of a pair."""
    models = {"dense": model_figures(), "prefill": model_figures(blocks=5), "decode": model_figures(blocks=4)}
    return EvaluationResult.model_validate({"models": models, "pair": pair_figures()} | changes)


def removal(**changes: Any) -> RemovalResult:
    """Prefill gives up block 2; decode 4 besides, and 3, for which block 1 comes to stand."""
    found: dict[str, Any] = {
        "prefill": {"num_blocks": BLOCKS, "deleted": [2], "distilled": {}},
        "decode": {"num_blocks": BLOCKS, "deleted": [2, 4], "distilled": {"3": 1}},
        "losses": {
            "objective": "kl",
            "prefill": 0.1,
            "decode": 0.4,
            "controls": {
                "decode_set_in_both": 0.5,
                "decode_only": 0.3,
                "non_nested": 0.35,
                "non_nested_removed": [2, 3, 5],
            },
        },
        "sensitivity": {
            "dense": {"both": 0.0, "decode_only": 0.0},
            "blocks": [{"block": block, "both": 0.1 + block, "decode_only": 0.05} for block in range(BLOCKS)],
        },
        "effort": {
            "prefill": {
                "greedy": {"sets": 12, "whole_evaluations": 5.5},
                "annealing": {"sets": 36, "whole_evaluations": 36.0},
                "ended_by": "budget",
            },
            "decode": {"greedy": {"sets": 9, "whole_evaluations": 4.0}},
        },
    }
    return RemovalResult.model_validate(found | changes)


def plan(**changes: Any) -> Plan:
    """Prefill gives up two of the blocks, decode four, under a bound on perplexity in prefill."""
    in_prefill = [((), 0.0), ((1,), 0.05), ((2, 3), 0.11), ((1, 2, 3), 0.3)]
    in_decode = [((1, 4), 0.1), ((1, 3, 4), 0.2), ((1, 2, 3, 4), 0.4)]
    found: dict[str, Any] = {
        "seed": 0,
        "prompt_tokens": 128,
        "distillation_threshold": 0.95,
        "kv_layer_map": [0, 3],
        "frontier": {
            half: [{"remove_blocks": len(removed), "removed": list(removed), "loss": loss} for removed, loss in points]
            for half, points in (("prefill", in_prefill), ("decode", in_decode))
        },
        # Within the bound is not the set of least loss.
        "prefill": {"num_blocks": BLOCKS, "deleted": [1], "distilled": {"4": 3}},
        "decode": {"num_blocks": BLOCKS, "deleted": [1, 2, 3, 4], "distilled": {}},
        "losses": {
            "objective": "kl",
            "prefill": 0.12,
            "decode": 0.4,
            "controls": {"decode_set_in_both": 0.5, "decode_only": 0.3},
        },
        "bounds": {
            "prefill": {
                "max_perplexity_increase": 0.25,
                "perplexity_increase": 0.2,
                "met": True,
                "dense_perplexity": 20.0,
                "frontier": [{"remove_blocks": n, "perplexity_increase": 0.1 * n} for n in range(4)],
            },
        },
    }
    return Plan.model_validate(found | changes)


RESULTS: dict[StageName, Result] = {
    StageName.SCORING: ScoringResult.model_validate(
        {"blocks": BLOCKS, "cosine": [0.5] * BLOCKS, "windows": {"train": 9, "calibration": 4, "validation": 4}}
    ),
    StageName.REMOVAL: removal(),
    StageName.DISTILLATION: DistillationResult(enabled=False),
    StageName.EXPORT: ExportResult(checkpoints={}),
    StageName.EVALUATION: evaluation(),
}
"""What each stage of a job found, of which a test wants to know no more than that."""
