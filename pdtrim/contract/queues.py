"""Which workers a job goes to, and which of the jobs that wait goes first."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import StringConstraints

QueueName = Annotated[str, StringConstraints(pattern="^[a-z0-9][a-z0-9_-]{0,47}$")]
"""A label of workers, such as `gpu-80g`."""
DEFAULT_QUEUE = "default"


class Priority(StrEnum):
    """Of the stages that wait, those of `high` jobs go first, those of `low` ones last. In the order of urgency."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"
