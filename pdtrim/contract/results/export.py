"""What export finds: the checkpoints that it wrote and proved."""

from __future__ import annotations

from pydantic import Field

from pdtrim.contract.results.base import Result, Way


class TokenRule(Result):
    """Which decode layers receive the keys and values of the prompt's first and last tokens alone."""

    first: int
    last: int
    layers: list[int] = Field(description="Layers of the decode checkpoint; the others receive every token's.")


class CheckpointProof(Result):
    """A checkpoint in the store."""

    files: int
    bytes: int
    max_logit_difference: float = Field(
        description="The largest difference of its logits from those of the pruned model that it was made of."
    )


class ExportResult(Result):
    """What the export stage found."""

    way: Way = Field(
        default="resident",
        description="How the checkpoints were proved: `resident`, each beside the pruned model in memory, or "
        "`streamed`, both read block by block from disk.",
    )
    checkpoints: dict[str, CheckpointProof] = Field(description="By role: `unified`, or `prefill` and `decode`.")
    kv_tokens: TokenRule | None = Field(default=None, description="Null where the job asked for none.")
    notes: list[str] = Field(
        default_factory=list, description="What is to be known before these checkpoints are served, in sentences."
    )
