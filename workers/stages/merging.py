"""Merging: the pairs of blocks that a search may distil, each fitted once; the fits are kept in the store.

Fits come in two kinds. Prefill's are free; those for decode alone leave alone what makes keys and values, so that the
ones that prefill hands over stay valid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pdtrim.contract.results import Merge
from workers.inputs.models import device
from workers.pruning.model.blocks import BlockStack
from workers.pruning.model.units import Unit, Units, by_absorber
from workers.pruning.repair.distill import fitted_block, kv_tensor_names, merge
from workers.pruning.repair.training import TrainingSettings
from workers.stages.context import StageContext
from workers.stages.training import HELD_OUT_WINDOWS, Tensors, journal, settings

GROUP_BYTES = 2**30
"""What the pairs fitted at a time may take. Fixed: the memory of a moment must not change a fit."""
COPIES = 6
"""Float32 copies of a block in training: its weights, the first and the best ones, gradients, and AdamW's two."""
Span = tuple[float, float]


@dataclass(frozen=True)
class Fit:
    """A block fitted to stand for a pair, and the held-out losses of the absorber alone and of it."""

    before: float
    after: float
    tensors: Tensors
    """Trained ones, by their dense names, in float32."""
    block: nn.Module

    @property
    def offered(self) -> bool:
        """Whether a search may choose it: no better than the absorber that it started from, it may not."""
        return self.after < self.before


@dataclass(frozen=True)
class Fits:
    """Every fit by its unit."""

    free: Mapping[Unit, Fit] = field(default_factory=dict)
    frozen: Mapping[Unit, Fit] = field(default_factory=dict)

    @property
    def for_prefill(self) -> dict[Unit, Fit]:
        """What the search for prefill may choose from."""
        return {unit: fit for unit, fit in self.free.items() if fit.offered}

    def for_decode(self, prefill: Units) -> dict[Unit, Fit]:
        """The same for decode; the pairs that prefill distilled stay as they are."""
        own = {unit: fit for unit, fit in self.frozen.items() if fit.offered}
        return own | {unit: self.free[unit] for unit in prefill if unit in self.free}

    def tensors(self, prefill: Units, decode: Units) -> Tensors:
        """The trained tensors of all pairs that the two sets distil."""
        fits = self.for_decode(prefill)
        chosen = {*by_absorber(prefill).values(), *by_absorber(decode).values()}
        return {name: tensor for unit in sorted(chosen) for name, tensor in fits[unit].tensors.items()}

    def merges(self) -> list[Merge]:
        """What each fit came to."""
        return [
            Merge(
                removed=unit.block,
                into=unit.absorber,
                decode_only=decode_only,
                before=fit.before,
                after=fit.after,
                offered=fit.offered,
            )
            for decode_only, fits in ((False, self.free), (True, self.frozen))
            for unit, fit in sorted(fits.items())
            if unit.absorber is not None
        ]


def modules(fits: Mapping[Unit, Fit]) -> dict[Unit, nn.Module]:
    """The fitted blocks by unit."""
    return {unit: fit.block for unit, fit in fits.items()}


def distillable(context: StageContext, cosine: list[float]) -> list[tuple[int, int]]:
    """Pairs (removed, absorber) that a search may distil: blocks below the threshold that are free to go or stay."""
    spec, num_blocks = context.spec, len(cosine)
    fixed = {*spec.search.protect, *spec.search.force}
    return [
        (removed, absorber)
        for removed in range(num_blocks)
        for absorber in (removed - 1, removed + 1)
        if cosine[removed] < spec.distillation.threshold
        and removed not in fixed
        and 0 <= absorber < num_blocks
        and absorber not in spec.search.force
    ]


@dataclass(frozen=True)
class Fitter:
    """Fits pairs of the dense model of `stack` on `windows` (windows, tokens), or finds them in the store."""

    context: StageContext
    stack: BlockStack
    windows: Mapping[str, Tensor]

    def fits(self, cosine: list[float], *, free: bool, frozen: bool, span: Span) -> Fits:
        """The kinds that are asked for, of all distillable pairs. Raises: what training raises."""
        pairs = distillable(self.context, cosine)
        kinds = [kind for kind, asked in (("free", free), ("frozen", frozen)) if asked]
        groups = [(kind, group) for kind in kinds for group in self._groups(pairs)]
        found: dict[str, dict[Unit, Fit]] = {"free": {}, "frozen": {}}
        start, end = span
        for number, (kind, group) in enumerate(groups):
            share = (end - start) / len(groups)
            part = (start + number * share, start + (number + 1) * share)
            found[kind] |= self._group(f"pairs-{kind}-{number}", group, frozen=kind == "frozen", span=part)
        return Fits(found["free"], found["frozen"])

    @property
    def training(self) -> TrainingSettings:
        """How long each pair is fitted."""
        return settings(self.context, self.context.spec.distillation.merge_tokens, self.windows["train"].shape[1])

    def _groups(self, pairs: list[tuple[int, int]]) -> list[dict[int, int]]:
        """Pairs that are fitted together: as many as memory holds, each with an absorber of its own."""
        block_bytes = 4 * COPIES * sum(parameter.numel() for parameter in self.stack.blocks[0].parameters())
        at_once = max(1, GROUP_BYTES // block_bytes)
        sides = [[pair for pair in pairs if pair[1] - pair[0] == side] for side in (-1, 1)]
        return [dict(side[i : i + at_once]) for side in sides for i in range(0, len(side), at_once)]

    def _group(self, name: str, pairs: dict[int, int], *, frozen: bool, span: Span) -> dict[Unit, Fit]:
        state = self.context.load_tensors(f"{name}-fitted.safetensors")
        if state is None:
            state = self._train(name, pairs, frozen=frozen, span=span)
            self.context.save_tensors(f"{name}-fitted.safetensors", state)
        fits = {}
        for removed, absorber in pairs.items():
            prefix = f"{self.stack.prefix}{absorber}."
            tensors = {tensor: state[tensor] for tensor in state if tensor.startswith(prefix)}
            before, after = state[f"losses.{removed}"].tolist()
            block = fitted_block(self.stack, absorber, tensors)
            fits[Unit(removed, absorber)] = Fit(before, after, tensors, block)
        return fits

    def _train(self, name: str, pairs: dict[int, int], *, frozen: bool, span: Span) -> Tensors:
        shaping = {tensor for absorber in pairs.values() for tensor in kv_tensor_names(self.stack, absorber)}
        tensors, losses = merge(
            self.stack.model,
            pairs,
            frozen=shaping if frozen else set(),
            windows=self.windows["train"].to(device()),
            held_out=self.windows["calibration"][:HELD_OUT_WINDOWS].to(device()),
            settings=self.training,
            journal=journal(self.context, name, span, "Fitting pairs of blocks."),
        )
        found = {f"losses.{removed}": torch.tensor(pair, dtype=torch.float64) for removed, pair in losses.items()}
        return {tensor: value.cpu() for tensor, value in tensors.items()} | found
