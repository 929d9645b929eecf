"""Whether a model of so many blocks can give up what a job asks for."""

from __future__ import annotations

from service.contract.errors import InvalidRequest, TooManyBlocks
from service.contract.spec import JobSpec


def check_blocks(spec: JobSpec, blocks: int) -> None:
    """Hold the block counts and indices of a job against a model of `blocks` blocks.

    Raises: InvalidRequest for a block that the model does not have; TooManyBlocks when too few would remain.
    """
    for name, listed in (("protect", spec.search.protect), ("force", spec.search.force)):
        if listed and max(listed) >= blocks:
            raise InvalidRequest(
                f"search.{name} lists block {max(listed)}, but the model's {blocks} blocks are 0 to {blocks - 1}.",
                param=f"search.{name}",
            )
    protected = len(spec.search.protect)
    # Decode removes at least as many as prefill does, so prefill is looked at first: both may be too many.
    for stage, target in (("prefill", spec.prefill), ("decode", spec.decode)):
        if target.remove_blocks >= blocks:
            raise TooManyBlocks(
                f"{stage}.remove_blocks is {target.remove_blocks}, but the model has {blocks} blocks and must keep "
                f"one: at most {blocks - 1} can be removed.",
                param=f"{stage}.remove_blocks",
            )
        if target.remove_blocks > blocks - protected:
            raise TooManyBlocks(
                f"search.protect keeps {protected} of the model's {blocks} blocks, so at most {blocks - protected} can "
                f"be removed, but {stage}.remove_blocks is {target.remove_blocks}; protect or remove fewer.",
                param="search.protect",
            )
