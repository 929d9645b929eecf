"""Repair without training: what a removed run of blocks did, as far as a linear map can, folded into the MLP before it.

ReplaceMe (Shopkhoev et al., arXiv 2505.02819): after block a the blocks up to b are gone. Let y be the hidden state
after a's attention, m what a's MLP adds to it, and L the dense model's hidden state after b. Least squares over the
tokens of calibration windows give the matrix T with y + T m ≈ L, which is multiplied into the MLP's last projection. So
the checkpoint keeps its form. A ridge draws T towards the identity, which is what a gap is without a fold.

Where an MLP's output is not added as it is (a norm behind it), or comes from several last projections (experts), or
where no block stands before the gap, there is no such fold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workers.pruning.model.blocks import BlockCalls, BlockStack, capture_calls, run_block
from workers.pruning.model.parts import find_part, run_without
from workers.pruning.model.plan import BlockPlan

HOST = torch.device("cpu")
PROBE_TOKENS = 4
ADDED_TOLERANCE = 1e-2
"""By how much of its own size what a block adds may differ from a multiple of its MLP's output, rounding being that."""
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths of the ridge to choose from, as shares of the mean square of m in a direction."""


@dataclass(frozen=True, order=True)
class Gap:
    """A run of blocks that a half is without, as long as it can be."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"blocks {self.first} to {self.last}" if self.last > self.first else f"block {self.first}"


@dataclass(frozen=True)
class GapError:
    """How far the hidden states behind a gap are from the dense model's, without and with its fold.

    Squared, as shares of the dense states' own size, over the tokens that the fold was made from.
    """

    gap: Gap
    before: float
    after: float


@dataclass(frozen=True)
class Unfolded:
    """A gap that is left as it is."""

    gap: Gap
    reason: str


@dataclass(frozen=True)
class Fold:
    """What folding comes to."""

    tensors: Mapping[str, Tensor]
    """What changed, called as in the dense model, float32 and on the host."""
    errors: Sequence[GapError]
    left_out: Sequence[Unfolded]


@dataclass
class Moments:
    """Sums over tokens, in float64, of what a block's MLP adds, m, and of what is missing behind the gap, r = L - h."""

    gram: Tensor
    """Σ m mᵀ (hidden, hidden)."""
    cross: Tensor
    """Σ m rᵀ (hidden, hidden)."""
    missing: float = 0.0
    """Σ |r|²."""
    size: float = 0.0
    """Σ |L|²."""

    @classmethod
    def none(cls, hidden: int, device: torch.device) -> Moments:
        """Of no tokens."""
        gram, cross = torch.zeros((2, hidden, hidden), dtype=torch.float64, device=device)
        return cls(gram, cross)

    def add(self, m: Tensor, missing: Tensor, wanted: Tensor, weights: Tensor | None = None) -> None:
        """Take up tokens: m, L - h and L (tokens, hidden), each counting as its weight (tokens,), or as one."""
        m, missing, wanted = (states.double() for states in (m, missing, wanted))
        if weights is not None:
            root = weights.double().sqrt()[:, None]
            m, missing, wanted = m * root, missing * root, wanted * root
        self.gram += m.T @ m
        self.cross += m.T @ missing
        self.missing += float(missing.square().sum())
        self.size += float(wanted.square().sum())

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.gram + other.gram, self.cross + other.cross, self.missing + other.missing, self.size + other.size
        )

    def error(self, change: Tensor) -> float:
        """Σ |r - D m|² of a change D (hidden, hidden), as a share of Σ |L|²."""
        explained = 2 * (change.T * self.cross).sum() - ((change @ self.gram) * change).sum()
        return (self.missing - float(explained)) / max(self.size, 1e-30)


ChangeOf = Callable[[Moments, Moments], Tensor]
"""From the moments of two halves of the windows to D = T - 1 (hidden, hidden), float64."""


def ridge_change(moments: Moments, penalty: float) -> Tensor:
    """The D of least Σ |r - D m|² + penalty |D|²."""
    eye = torch.eye(len(moments.gram), dtype=torch.float64, device=moments.gram.device)
    change: Tensor = torch.linalg.solve(moments.gram + penalty * eye, moments.cross).T
    return change


def scale_of(moments: Moments) -> float:
    """The mean of Σ m² over directions, which a ridge is measured by."""
    return float(moments.gram.diagonal().mean())


def crossed_change(ones: Moments, others: Moments) -> Tensor:
    """The ridge solution on all windows, with that penalty of `RIDGES` which does best when each half is held out.

    Where none of them does better than no change, there is none.
    """
    both = ones + others
    errors: dict[float, float] = {}
    for ridge in RIDGES:
        penalty = ridge * scale_of(both)
        errors[penalty] = sum(
            held_out.error(ridge_change(fitted, penalty)) for fitted, held_out in ((ones, others), (others, ones))
        )
    best = min(errors, key=lambda penalty: errors[penalty])
    nothing = torch.zeros_like(both.gram)
    if errors[best] >= ones.error(nothing) + others.error(nothing):
        return nothing
    return ridge_change(both, best)


Weighing = Callable[[Tensor], Tensor]
"""From the dense model's hidden states (tokens, hidden) to what each token counts (tokens,)."""


def by_size(wanted: Tensor) -> Tensor:
    """Errors count as shares of a token's own hidden state, which is what the norms of later blocks see."""
    return 1 / wanted.double().square().sum(-1).clamp(min=1e-30)


def gaps_of(plan: BlockPlan) -> list[Gap]:
    """The runs of blocks that a half is without, ascending.

    Those that are kept for their keys and values are in none: they make these of the states that enter them, which a
    fold would replace by those behind.
    """
    gaps: list[Gap] = []
    for block in sorted(plan.removed):
        if gaps and gaps[-1].last == block - 1:
            gaps[-1] = Gap(gaps[-1].first, block)
        else:
            gaps.append(Gap(block, block))
    return gaps


@dataclass(frozen=True)
class Foldable:
    """The MLP that takes a gap's fold."""

    block: int
    projection: nn.Module
    """Its last one, an `nn.Linear` or a `Conv1D`."""
    name: str
    """Of the projection, in the dense model."""
    factor: float
    """By which its output is multiplied when the block adds it to the hidden state."""


@torch.no_grad()
def foldable(stack: BlockStack, plan: BlockPlan, gap: Gap) -> Foldable | str:
    """What takes the fold of a gap, or why nothing does. Two short runs of the block before the gap show which."""
    number = gap.first - 1
    if number < 0:
        return "no block stands before it"
    if plan.parts.get(number) in ("mlp", "kv_only"):
        return f"block {number} before it gives up its MLP"
    block = stack.blocks[number]
    part = find_part(block, "mlp")
    names = set() if part is None else {name.rpartition(".")[0] for name in part.last}
    if len(names) != 1:
        return f"the MLP of block {number} before it has not one last projection"
    (name,) = names
    projection = block.get_submodule(name)
    if not isinstance(projection, nn.Linear | Conv1D):
        return f"the last projection of block {number} before it is not a plain linear layer"
    factor = _added_by(stack, number, projection)
    if factor is None:
        return f"block {number} before it does not add its MLP's output as it is"
    return Foldable(number, projection, f"{stack.prefix}{number}.{name}", factor)


def _added_by(stack: BlockStack, number: int, projection: nn.Module) -> float | None:
    """The factor by which a block adds its projection's output to the hidden state; None where it does otherwise.

    What the projection gives is replaced, once by zeros and once by numbers whose size differs between tokens, which a
    norm behind it would even out.
    """
    seeded = torch.Generator().manual_seed(0)
    ids = torch.zeros((1, PROBE_TOKENS), dtype=torch.long, device=stack.device)
    calls, entered = capture_calls(stack, ids), stack.embed(ids)
    h, given = (torch.randn(entered.shape, generator=seeded).to(entered) for _ in range(2))
    given = given * torch.arange(1, PROBE_TOKENS + 1).to(given)[:, None]

    def after(output: Tensor) -> Tensor:
        with hooked(projection, lambda own: output.to(own).view_as(own)):
            return run_block(stack.blocks[number], h, calls.kwargs[number]).double().cpu()

    added, given = after(given) - after(torch.zeros_like(given)), given.double().cpu()
    factor = float((added * given).sum() / given.square().sum())
    off = (added - factor * given).norm() / given.norm()
    return factor if abs(factor) > ADDED_TOLERANCE and float(off) <= ADDED_TOLERANCE * abs(factor) else None


@contextmanager
def hooked(module: nn.Module, replaced: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While this lasts, `module` gives what `replaced` makes of its output."""

    def hook(owner: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return replaced(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Wanted:
    """The dense model's hidden states behind the gaps of a half."""

    chunks: Sequence[Tensor]
    """Token ids (batch, time) of some windows each."""
    behind: Mapping[int, Sequence[Tensor]]
    """By the last block of a gap, what it gives for each chunk (batch, time, hidden)."""
    held_on: torch.device


@torch.no_grad()
def wanted_states(
    dense: BlockStack,
    plan: BlockPlan,
    windows: Tensor,
    *,
    chunk_windows: int,
    held_on: torch.device = HOST,
    check: Callable[[], None] = lambda: None,
) -> Wanted:
    """What `fold` needs of the dense model, on windows (windows, time), in one walk over its blocks.

    Besides the states that are returned, those of one more block are held. `check`, which may raise, is called before
    every block.
    """
    calls, chunks = capture_calls(dense, windows), windows.split(chunk_windows)
    lasts = {gap.last for gap in gaps_of(plan)}
    states = [dense.embed(ids).to(held_on) for ids in chunks]
    behind: dict[int, Sequence[Tensor]] = {}
    for block in range(max(lasts, default=-1) + 1):
        check()
        states = [calls.run(dense, block, h.to(dense.device)).to(held_on) for h in states]
        if block in lasts:
            behind[block] = states
    return Wanted(chunks, behind, held_on)


@torch.no_grad()
def fold(
    own: BlockStack,
    plan: BlockPlan,
    wanted: Wanted,
    *,
    change_of: ChangeOf = crossed_change,
    weighing: Weighing | None = None,
    check: Callable[[], None] = lambda: None,
) -> Fold:
    """Fold every gap of a half that gives up what `plan` says, from the lowest to the highest.

    `own` are all blocks of the half before it gives them up. One walk from bottom to top: the states that a fold is
    made from are those of the half with all folds below. It is not changed. Two hidden states of all windows are held
    beside those that are wanted; a gap's sums take 4 · hidden² numbers of float64. `check`, which may raise, is called
    before every block.
    """
    found, left_out = _taken(own, plan)
    calls, held_on = capture_calls(own, wanted.chunks[0]), wanted.held_on
    states = [own.embed(ids).to(held_on) for ids in wanted.chunks]
    tensors: dict[str, Tensor] = {}
    errors: list[GapError] = []
    taking = {into.block: (gap, into) for gap, into in found.items()}
    passed = {block for gap in gaps_of(plan) for block in range(gap.first, gap.last + 1)}
    for block in range(max(taking, default=-1) + 1):
        check()
        if block in passed:
            continue
        if block not in taking:
            states = [_run(own, calls, block, plan, h).to(held_on) for h in states]
            continue
        gap, into = taking[block]
        states, given = _run_apart(own, calls, into, plan, states)
        halves = moments_of(states, given, wanted.behind[gap.last], own.device, weighing)
        change = change_of(*halves)
        both = halves[0] + halves[1]
        errors.append(GapError(gap, before=both.error(torch.zeros_like(change)), after=both.error(change)))
        tensors |= folded(into, change)
        states = [
            (h.double() + m.double() @ change.T.to(held_on)).to(h.dtype) for h, m in zip(states, given, strict=True)
        ]
    return Fold(tensors, errors, left_out)


def _taken(own: BlockStack, plan: BlockPlan) -> tuple[dict[Gap, Foldable], list[Unfolded]]:
    """What takes each gap's fold, and the gaps for which nothing does."""
    found: dict[Gap, Foldable] = {}
    left_out: list[Unfolded] = []
    for gap in gaps_of(plan):
        into = foldable(own, plan, gap)
        if isinstance(into, str):
            left_out.append(Unfolded(gap, into))
        else:
            found[gap] = into
    return found, left_out


def _run(own: BlockStack, calls: BlockCalls, block: int, plan: BlockPlan, h: Tensor) -> Tensor:
    """h_i (batch, time, hidden) → h_{i+1}, same shape."""
    part, entering = plan.parts.get(block), h.to(own.device)
    if part is None:
        return calls.run(own, block, entering)
    return run_without(own.blocks[block], part, entering, calls.kwargs[block])


def _run_apart(
    own: BlockStack, calls: BlockCalls, into: Foldable, plan: BlockPlan, states: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """What a block makes of each h_i (batch, time, hidden), and what of that its MLP adds, same shape."""
    after: list[Tensor] = []
    given: list[Tensor] = []

    def keep(output: Tensor) -> Tensor:
        given.append(into.factor * output)
        return output

    with hooked(into.projection, keep):
        for h in states:
            after.append(_run(own, calls, into.block, plan, h).to(h.device))
            given[-1] = given[-1].to(h.device)
    return after, [m.view_as(h) for m, h in zip(given, after, strict=True)]


def moments_of(
    states: Sequence[Tensor],
    given: Sequence[Tensor],
    wanted: Sequence[Tensor],
    device: torch.device,
    weighing: Weighing | None,
) -> tuple[Moments, Moments]:
    """Of every other window, and of those between."""
    hidden, before = states[0].shape[-1], 0
    halves = Moments.none(hidden, device), Moments.none(hidden, device)
    for h, m, dense in zip(states, given, wanted, strict=True):
        turned, before = before % 2, before + len(h)
        for number, moments in enumerate(halves):
            start = (number + turned) % 2
            here, added, there = (s[start::2].to(device).flatten(0, 1) for s in (h, m, dense))
            moments.add(added, there.double() - here.double(), there, None if weighing is None else weighing(there))
    return halves


def folded(into: Foldable, change: Tensor) -> dict[str, Tensor]:
    """The projection's tensors, times 1 + D, float32 on the host."""
    map_ = torch.eye(len(change), dtype=torch.float64, device=change.device) + change
    tensors = {}
    for name, parameter in into.projection.named_parameters():
        tensor = parameter.detach().double().to(map_.device)
        # Linear keeps (out, in), Conv1D (in, out); a bias is (out,).
        product = tensor @ map_.T if isinstance(into.projection, Conv1D) or tensor.dim() == 1 else map_ @ tensor
        tensors[f"{into.name}.{name}"] = product.float().cpu()
    return tensors
