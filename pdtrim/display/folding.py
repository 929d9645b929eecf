"""What folds came to, in words."""

from __future__ import annotations

from pdtrim.contract.results import Folding


def folding_line(found: Folding) -> str:
    """By how much they lower the held-out loss, whether they are kept, and which gaps are left as they are."""
    said = []
    if found.before is not None and found.after is not None:
        kept = "folded weights are kept" if found.kept == "folded" else "in vain, unfolded weights are kept"
        said.append(f"Held-out loss {found.before:.4f} → {found.after:.4f} by folds alone: {kept}.")
    for gap in found.left_out:
        blocks = f"blocks {gap.first} to {gap.last}" if gap.last > gap.first else f"block {gap.first}"
        said.append(f"Nothing is folded for {blocks}: {gap.reason}.")
    return " ".join(said)
