"""Whether a model of so many blocks can give up what a job asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pdtrim.contract.errors import InvalidRequest, TooManyBlocks, raise_all
from pdtrim.contract.spec import JobSpec, Part

FIELDS: Mapping[Part, str] = {
    "attention": "remove_attentions",
    "kv_only": "kv_only_blocks",
    "mlp": "remove_mlps",
}
"""What the specification calls how many blocks give up which part."""


def most_removable(spec: JobSpec, blocks: int) -> int:
    """How many of a model's `blocks` may go at most: one block stays, and every protected one."""
    return blocks - max(1, len(spec.search.protect))


def limits(spec: JobSpec, blocks: int) -> tuple[int, int]:
    """The most of a model's `blocks` that prefill and decode may give up."""
    most = most_removable(spec, blocks)
    asked = (spec.prefill.remove_blocks, spec.decode.remove_blocks)
    decode = most if asked[1] is None else asked[1]
    # What prefill gives up, decode does too.
    return min(most if asked[0] is None else asked[0], decode), decode


def check_blocks(spec: JobSpec, blocks: int) -> None:
    """Hold the block counts and indices of a job against a model of `blocks` blocks.

    Raises: InvalidRequest for a block that the model does not have; TooManyBlocks when too few would remain. All that
    is wrong besides stands in the error's `others`.
    """
    raise_all(list(_unknown_blocks(spec, blocks)) or list(_too_many_blocks(spec, blocks)))


def _unknown_blocks(spec: JobSpec, blocks: int) -> Iterator[InvalidRequest]:
    for name, listed in (("protect", spec.search.protect), ("force", spec.search.force)):
        if listed and max(listed) >= blocks:
            yield InvalidRequest(
                f"search.{name} lists block {max(listed)}, but the model's {blocks} blocks are 0 to {blocks - 1}.",
                param=f"search.{name}",
            )


def _too_many_blocks(spec: JobSpec, blocks: int) -> Iterator[TooManyBlocks]:
    most = most_removable(spec, blocks)
    if len(spec.search.force) > most:
        yield TooManyBlocks(
            f"search.force lists {len(spec.search.force)} of the model's {blocks} blocks, of which at most {most} can "
            "be removed; force fewer.",
            param="search.force",
        )
    for stage, target in (("prefill", spec.prefill), ("decode", spec.decode)):
        removed, parts = target.remove_blocks or 0, sum(target.parts.values())
        left = blocks - len(spec.search.protect) - removed
        if removed >= blocks:
            yield TooManyBlocks(
                f"{stage}.remove_blocks is {removed}, but the model has {blocks} blocks and must keep one: at most "
                f"{blocks - 1} can be removed.",
                param=f"{stage}.remove_blocks",
            )
        elif removed > most:
            yield TooManyBlocks(
                f"search.protect keeps {len(spec.search.protect)} of the model's {blocks} blocks, so at most {most} "
                f"can be removed, but {stage}.remove_blocks is {removed}; protect or remove fewer.",
                param="search.protect",
            )
        elif parts > left:
            yield TooManyBlocks(
                f"{stage} gives up parts of {parts} blocks besides the {removed} that it removes, but of the model's "
                f"{blocks} blocks {left} are left that search.protect does not keep; give up fewer.",
                param=f"{stage}.{FIELDS[next(iter(target.parts))]}",
            )
