"""What a removal stage leaves, as far as the gateway reads it."""

from __future__ import annotations

from typing import Any


def plan() -> dict[str, Any]:
    """Of a job on six blocks: prefill gives up 2 of them, decode 4, under a bound on perplexity in prefill."""
    in_prefill = [((), 0.0), ((1,), 0.05), ((2, 3), 0.11), ((1, 2, 3), 0.3)]
    in_decode = [((1, 4), 0.1), ((1, 3, 4), 0.2), ((1, 2, 3, 4), 0.4)]
    return {
        "frontier": {
            half: [{"remove_blocks": len(removed), "removed": list(removed), "loss": loss} for removed, loss in points]
            for half, points in (("prefill", in_prefill), ("decode", in_decode))
        },
        # Within the bound is not the set of least loss.
        "prefill": {"num_blocks": 6, "deleted": [1], "distilled": {"4": 3}},
        "decode": {"num_blocks": 6, "deleted": [1, 2, 3, 4], "distilled": {}},
        "losses": {"objective": "kl", "prefill": 0.12, "decode": 0.4},
        "bounds": {
            "prefill": {"frontier": [{"remove_blocks": n, "perplexity_increase": 0.1 * n} for n in range(4)]},
            "decode": None,
        },
    }
