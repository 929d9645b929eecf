"""The plan: what removal decided, as every later stage reads it."""

from __future__ import annotations

from pydantic import Field

from pdtrim.contract.results.base import Halves, Result
from pdtrim.contract.results.removal import Removed

PLAN = "plan.json"
"""The removal stage's artifact that holds the `Plan`."""


class FrontierSet(Result):
    """The best set found that gives up so many blocks."""

    remove_blocks: int = Field(ge=0)
    removed: list[int] = Field(description="The blocks that go, by their index in the dense model.")
    distilled: dict[int, int] = Field(
        default_factory=dict,
        description="Those of them that are distilled rather than deleted, and the kept block that stands for both.",
    )
    loss: float = Field(description="Calibration loss of the search's objective, before distillation.")


class Frontiers(Halves[list[FrontierSet]]):
    """The best set for every count, by count."""


class Plan(Removed):
    """The content of `plan.json`."""

    format_version: int = 1
    seed: int
    prompt_tokens: int
    """The first so many tokens of a window are the prompt; the rest is the continuation."""
    distillation_threshold: float
    """The cosine score below which a removed block is distilled, where the search did not weigh that."""
    kv_layer_map: list[int]
    """For each layer of the decode checkpoint, the layer of the prefill checkpoint whose KV cache it reads."""
    frontier: Frontiers
