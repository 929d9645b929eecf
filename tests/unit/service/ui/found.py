"""What the stages of a small job found: the metrics of a model of six blocks that gives up one and three."""

from __future__ import annotations

from typing import Any

COSINE = [-0.05, 0.93, 0.97, 0.95, 0.96, 0.92]
REMOVAL: dict[str, Any] = {
    "prefill": {"num_blocks": 6, "deleted": [2], "distilled": {}},
    "decode": {"num_blocks": 6, "deleted": [2, 4], "distilled": {"3": 1}},
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
    "bounds": {"prefill": None, "decode": None},
    "sensitivity": {
        "dense": {"both": 0.0, "decode_only": 0.0},
        "blocks": [{"block": block, "both": 0.1 + block, "decode_only": 0.05} for block in range(6)],
    },
}
PLAN: dict[str, Any] = {
    **REMOVAL,
    "frontier": {
        "prefill": [
            {"remove_blocks": 0, "removed": [], "loss": 0.0},
            {"remove_blocks": 1, "removed": [2], "loss": 0.1},
        ],
        "decode": [
            {"remove_blocks": 1, "removed": [2], "loss": 0.2},
            {"remove_blocks": 2, "removed": [2, 4], "loss": 0.3},
            {"remove_blocks": 3, "removed": [2, 3, 4], "loss": 0.4},
        ],
    },
}
SEARCH: dict[str, Any] = {
    "prefill": [{"removed": [block], "loss": loss} for block, loss in enumerate((5.0, 0.4, 0.1, 0.3))],
    "decode": [{"removed": [2, 3, 4], "loss": 0.4}],
}
