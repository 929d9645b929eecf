"""What was estimated of a job beside what it took, as rows of Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdtrim.contract.estimate import Estimate
from pdtrim.contract.jobs import StageName

MEGABYTE = 10**6


@dataclass(frozen=True)
class Measured:
    """What a stage took."""

    seconds: float
    processor_seconds: float
    resident: int
    """Bytes, the most at one time."""
    block_tokens: int
    """Tokens times blocks that went forwards; recomputed ones count again."""
    stored: int
    """Bytes of its artifacts."""
    result: Mapping[str, Any]


def of_sets(title: str, told: Estimate, took: Mapping[StageName, Measured]) -> str:
    """Parameters and sets."""
    models = took[StageName.EVALUATION].result["models"]
    estimated = {one.role: one.parameters for one in (told.dense, *told.checkpoints)}
    parameters = ", ".join(
        f"{role} {models[role]['parameters']:,} ({_difference(count, models[role]['parameters'])})"
        for role, count in estimated.items()
    )
    found = sets_of(took[StageName.REMOVAL].result)
    sets = ", ".join(
        f"{name} {found[name]:,} ({_span(span.least, span.most)})"
        for name, span in told.evaluations.ranges.items()
        if found[name] or span.most
    )
    return f"| {title} | {parameters} | {sets} |"


def _difference(estimated: int | None, found: int) -> str:
    if estimated is None:
        return "unknown"
    return "exact" if estimated == found else f"{estimated - found:+,}"


def _span(least: int, most: int) -> str:
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def sets_of(removal: Mapping[str, Any]) -> dict[str, int]:
    """Sets that each search compared, by its name in an estimate."""
    effort = removal["effort"]
    parts = sum(_compared(part["effort"]) for part in removal["parts"])
    budgets = sum(budget["sets"] for budget in removal["budgets"])
    return {
        "prefill": _compared(effort["prefill"]),
        "decode": _compared(effort["decode"]),
        "parts": parts + budgets,
    }


def _compared(effort: Mapping[str, Any] | None) -> int:
    algorithms = ("greedy", "annealing", "exhaustive")
    return sum(effort[name]["sets"] for name in algorithms if effort and effort[name])


def of_stages(title: str, told: Estimate, took: Mapping[StageName, Measured]) -> Iterator[str]:
    """Memory and time of every stage: estimated, taken, and the one over the other."""
    for stage in told.stages:
        measured = took[stage.stage]
        memory = stage.memory_bytes / measured.resident
        seconds = stage.seconds or 0.0
        yield (
            f"| {title} | {stage.stage} | {stage.way} | {stage.memory_bytes / MEGABYTE:.0f} | "
            f"{measured.resident / MEGABYTE:.0f} | {memory:.2f} | {seconds:.1f} | {measured.processor_seconds:.1f} | "
            f"{seconds / measured.processor_seconds:.2f} | {measured.seconds:.0f} |"
        )


def of_files(title: str, told: Estimate, took: Mapping[StageName, Measured]) -> str:
    """The store."""
    stored = sum(one.stored for one in took.values())
    estimated = told.store_bytes or 0
    return f"| {title} | {estimated / MEGABYTE:.1f} | {stored / MEGABYTE:.1f} | {estimated / stored:.2f} |"


def folder_bytes(folder: Path) -> int:
    """Of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
