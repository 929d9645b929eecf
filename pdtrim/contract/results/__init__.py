"""What each stage of a job finds: written by the stage, shown with the job, and held by its JSON artifacts.

Results are read in the form of earlier versions too: what those did not record has a default, and fields that are
unknown here are ignored.
"""

from __future__ import annotations

from pdtrim.contract.results.base import Half, Halves, Result
from pdtrim.contract.results.distillation import DistillationResult, FittedMerge, Healing
from pdtrim.contract.results.evaluation import (
    REPORT,
    CopyingLosses,
    EvaluationResult,
    FirstTokenLoss,
    FirstTokenLosses,
    KvBytes,
    ModelFigures,
    PairFigures,
    Perplexity,
    Spread,
    TaskMetric,
    TaskResult,
    TokenRuleFigures,
)
from pdtrim.contract.results.export import CheckpointProof, ExportResult, TokenRule
from pdtrim.contract.results.plan import PLAN, Frontiers, FrontierSet, Plan
from pdtrim.contract.results.removal import (
    BlockWorth,
    Bound,
    BoundIncrease,
    Bounds,
    Controls,
    DenseLoss,
    HalfPlan,
    Losses,
    Merge,
    Merging,
    PartSearch,
    PartSet,
    RemovalResult,
    Removed,
    SearchEffort,
    SearchEfforts,
    SearchPart,
    Sensitivity,
    SetsEvaluated,
)
from pdtrim.contract.results.scoring import SCORES, BlockScores, ScoringResult, WindowCounts
from pdtrim.contract.results.search import SEARCH, EvaluatedSet, SearchRecord

__all__ = [
    "PLAN",
    "REPORT",
    "SCORES",
    "SEARCH",
    "BlockScores",
    "BlockWorth",
    "Bound",
    "BoundIncrease",
    "Bounds",
    "CheckpointProof",
    "Controls",
    "CopyingLosses",
    "DenseLoss",
    "DistillationResult",
    "EvaluatedSet",
    "EvaluationResult",
    "ExportResult",
    "FirstTokenLoss",
    "FirstTokenLosses",
    "FittedMerge",
    "FrontierSet",
    "Frontiers",
    "Half",
    "HalfPlan",
    "Halves",
    "Healing",
    "KvBytes",
    "Losses",
    "Merge",
    "Merging",
    "ModelFigures",
    "PairFigures",
    "PartSearch",
    "PartSet",
    "Perplexity",
    "Plan",
    "RemovalResult",
    "Removed",
    "Result",
    "ScoringResult",
    "SearchEffort",
    "SearchEfforts",
    "SearchPart",
    "SearchRecord",
    "Sensitivity",
    "SetsEvaluated",
    "Spread",
    "TaskMetric",
    "TaskResult",
    "TokenRule",
    "TokenRuleFigures",
    "WindowCounts",
]
