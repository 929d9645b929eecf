"""How many token windows of a job's data are asked for, and how few are too few."""

from __future__ import annotations

from typing import Literal

from pdtrim.contract.spec import JobSpec

Split = Literal["train", "calibration", "validation"]
LEAST_WINDOWS = 4
"""Of each use, or as many as are asked for if those are fewer: a mean of fewer windows says nothing."""


def wanted_windows(spec: JobSpec) -> dict[Split, int]:
    """Windows by use: for training as many as distillation reads, and one more; one where the model makes its own."""
    own = spec.distillation.data == "self"
    return {
        "train": 1 if own else spec.distillation.heal_tokens // spec.calibration.window_tokens + 1,
        "calibration": spec.calibration.windows,
        "validation": spec.evaluation.windows,
    }


def least_windows(spec: JobSpec) -> dict[Split, int]:
    """Windows by use without which a job is refused."""
    return {split: min(count, LEAST_WINDOWS) for split, count in wanted_windows(spec).items()}
