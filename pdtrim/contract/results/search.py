"""The record of a search: every set that it evaluated."""

from __future__ import annotations

from pydantic import Field

from pdtrim.contract.results.base import Halves, Result
from pdtrim.contract.results.removal import BudgetSearch

SEARCH = "search.json"
"""The removal stage's artifact that holds the `SearchRecord`."""


class EvaluatedSet(Result):
    """A set of units and its loss."""

    removed: list[int]
    """The blocks that go."""
    distilled: dict[int, int] = Field(default_factory=dict)
    """Those of them that are distilled, and the kept block that stands for both."""
    loss: float


class SearchRecord(Halves[list[EvaluatedSet]]):
    """The content of `search.json`: for each half, the sets in the order of their first evaluation."""

    budgets: list[BudgetSearch] = Field(default_factory=list, description="Where a half has one; decode's first.")
