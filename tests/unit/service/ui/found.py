"""What the stages of a small job found: a model of six blocks that gives up one and three."""

from __future__ import annotations

from pdtrim.contract.results import Plan, SearchRecord
from tests.found import plan, removal

COSINE = [-0.05, 0.93, 0.97, 0.95, 0.96, 0.92]
REMOVAL = removal()
PLAN: Plan = plan(
    prefill=REMOVAL.prefill,
    decode=REMOVAL.decode,
    losses=REMOVAL.losses,
    bounds={},
    frontier={
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
)
SEARCH = SearchRecord.model_validate(
    {
        "prefill": [{"removed": [block], "loss": loss} for block, loss in enumerate((5.0, 0.4, 0.1, 0.3))],
        "decode": [{"removed": [2, 3, 4], "loss": 0.4}],
    }
)
