"""How many token windows of a job's data are asked for, how few are too few, and how many folds are made from."""

from __future__ import annotations

import math
from typing import Literal

from pdtrim.contract.spec import JobSpec

Split = Literal["train", "calibration", "validation"]
LEAST_WINDOWS = 4
"""Of each use, or as many as are asked for if those are fewer: a mean of fewer windows says nothing."""

FOLD_TOKENS_A_DIMENSION = 4
"""Tokens for each dimension of the hidden state that folds are made from while sets are compared."""


def windows_to_fold(hidden: int, window_tokens: int) -> int:
    """From how many windows folds are made while sets are compared: two at least, each half of them held out once."""
    return max(2, math.ceil(FOLD_TOKENS_A_DIMENSION * hidden / window_tokens))


def copying_share(spec: JobSpec) -> float:
    """Of the windows that sets are compared on, those that count again with their prompt said again, as a share.

    All, where sets are compared folded: with a quarter, what they keep of the prompt hangs on the windows.
    """
    if spec.calibration.copying is not None:
        return spec.calibration.copying
    return 1.0 if spec.search.folded else 0.25


def copying_windows(spec: JobSpec) -> int:
    """How many they are, of as many windows as are asked for."""
    return round(copying_share(spec) * spec.calibration.windows)


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
