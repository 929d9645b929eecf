"""Two models that hold some weights once."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel


def share(model: PreTrainedModel, owner: PreTrainedModel, *, own: Collection[str]) -> None:
    """Put the parameters of `owner` in place of those of `model` that have the same name, shape, precision and device,
    but for those whose names are in `own`.

    The values must be the same. What either model writes into them from then on, both have.
    """
    theirs = dict(owner.named_parameters())
    replaced: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters():  # of tied ones, the first alone
        other = theirs.get(name)
        if other is not None and name not in own and _alike(parameter, other):
            replaced[id(parameter)] = other
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in replaced:
                setattr(module, name, replaced[id(parameter)])


def _alike(one: nn.Parameter, other: nn.Parameter) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
