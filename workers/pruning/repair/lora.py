"""Low-rank adapters for healing (LoRA, Hu et al. 2021, arXiv 2106.09685), by the library peft.

A linear layer W is trained as W + (alpha / rank) · B A with A (rank, in) and B (out, rank) alone, B starting at zero;
then the product is added to W, so that the result is a model without adapters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from workers.pruning.model.blocks import UnsupportedArchitecture, block_stack

ADAPTER = "healing"


def linear_weights(
    model: PreTrainedModel, blocks: Iterable[int], *, frozen: Collection[str]
) -> dict[str, nn.Parameter]:
    """The weights (out, in) of every linear layer of `blocks`, by name, except `frozen`.

    Raises: UnsupportedArchitecture when there is none.
    """
    prefix = block_stack(model).prefix
    prefixes = tuple(f"{prefix}{block}." for block in blocks)
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    weights = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name in linears and name not in frozen and name.startswith(prefixes)
    }
    if not weights:
        raise UnsupportedArchitecture(
            f"model_type {model.config.model_type!r} has no linear layers in its blocks that adapters fit"
        )
    return weights


@contextmanager
def lora_adapters(
    model: PreTrainedModel, weights: Mapping[str, nn.Parameter], *, rank: int, alpha: float, seed: int
) -> Iterator[dict[str, nn.Parameter]]:
    """While this lasts, the layers of `model` that hold `weights` have adapters, which are yielded by their names.

    Nothing else of the model requires gradients. At the end the adapters are merged into `weights` in place, so every
    model that shares these has learned the same, and `model` has no adapters any more; after an exception they are
    dropped unmerged. `seed` alone decides how they start.
    """
    put_on = adapted(model, weights, rank=rank, alpha=alpha, seed=seed)
    try:
        yield {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    except BaseException:
        put_on.unload()
        raise
    else:
        put_on.merge_and_unload()
    finally:
        model.requires_grad_(False)


def adapted(
    model: PreTrainedModel, weights: Mapping[str, nn.Parameter], *, rank: int, alpha: float, seed: int
) -> LoraModel:
    """Put adapters on the layers of `model` that hold `weights`; nothing else of it requires gradients then."""
    chosen = {id(weight) for weight in weights.values()}
    targets = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module.weight) in chosen
    ]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LoraModel(model, config, ADAPTER)


@dataclass(frozen=True)
class Adapters:
    """Adapters on layers of a model, which keep their weights."""

    parameters: Mapping[str, nn.Parameter]
    """What is trained, by name."""
    _layers: Mapping[str, Any]

    def delta(self, weight: str) -> Tensor:
        """What they add to a weight, (out, in)."""
        found: Tensor = self._layers[weight].get_delta_weight(ADAPTER)
        return found.detach()


@contextmanager
def apart_adapters(
    model: PreTrainedModel, weights: Collection[str], *, rank: int, alpha: float, seed: int
) -> Iterator[Adapters]:
    """As `lora_adapters`, of weights of these names that lie on `meta` and come when their block is called.

    They are not merged: whoever wants what was learned adds `delta` to the weights, wherever these are.
    """
    linears: dict[str, Any] = {name: model.get_submodule(name.removesuffix(".weight")) for name in weights}
    at = block_stack(model).device
    for linear in linears.values():
        # peft puts adapters where the weight is. This one takes no memory.
        linear.weight = nn.Parameter(torch.zeros((), dtype=model.dtype, device=at).expand(linear.weight.shape))
    put_on = adapted(
        model, {name: linear.weight for name, linear in linears.items()}, rank=rank, alpha=alpha, seed=seed
    )
    for linear in linears.values():
        linear.weight = nn.Parameter(linear.weight.to("meta"), requires_grad=False)
    try:
        learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        yield Adapters(learning, {name: model.get_submodule(name.removesuffix(".weight")) for name in weights})
    finally:
        put_on.unload()
        model.requires_grad_(False)
