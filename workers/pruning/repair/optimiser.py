"""AdamW for parameters of either precision, and what has to be kept of it so that training goes on with the same bits.

float32 parameters have PyTorch's. That of bfloat16 ones keeps each moment in 8 bits a number (Dettmers et al. 2021,
arXiv 2110.02861: blocks of 256 numbers that share a scale, and codes that lie densely around zero), and rounds a new
weight up or down at random, the more often the nearer it is: rounded to the nearest, small steps would change nothing.
torchao has one like it, which is fast only where a C compiler is at hand, and whose import takes every process seconds.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BETAS = (0.9, 0.95)
EPSILON = 1e-8
BLOCK = 256
"""Numbers that share a scale."""
LEAST_NUMBERS = 4096
"""Of a tensor whose moments are worth 8 bits."""
STEP_NUMBERS = 2**24
"""Of one tensor, that a step in bfloat16 changes at a time."""
RANKS_APART = 2_654_435_761
"""Between the random numbers of two ranks. Odd, as generators on the CPU take 32 bits of it."""
SCALES = ".scales"
"""What the names of scales end in, beside those of the codes."""
Parameters = Mapping[str, nn.Parameter]


class Optimiser(ABC):
    """Changes some parameters by their gradients."""

    @abstractmethod
    def step(self, rate: float, number: int) -> None:
        """Step `number`, counted from 0, by the gradients, which are then gone, at a learning rate."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The moments, by names of their own; on the device, and none of what has had no gradient yet."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Take over what `state` gave after so many steps."""


def optimiser_of(parameters: Parameters, seed: int) -> Optimiser:
    """The one for the precision of `parameters`; some models keep a few in float32 among others in bfloat16."""
    small = any(parameter.dtype == torch.bfloat16 for parameter in parameters.values())
    return InBfloat16(parameters, seed) if small else InFloat32(parameters)


class InFloat32(Optimiser):
    """PyTorch's; on an accelerator fused, which holds nothing beside the moments."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._fused = next(iter(parameters.values())).device.type == "cuda" or None
        self._adamw = torch.optim.AdamW(
            parameters.values(), betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=self._fused
        )

    def step(self, rate: float, number: int) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self._adamw.zero_grad()

    def state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            # What the loss does not depend on has no gradient, and AdamW no moments of it.
            if moments := self._adamw.state.get(parameter):
                found |= {f"mean.{name}": moments["exp_avg"], f"square.{name}": moments["exp_avg_sq"]}
        return found

    def restore(self, state: Mapping[str, Tensor], steps: int) -> None:
        for name, parameter in self._parameters.items():
            if f"mean.{name}" in state:
                at = parameter.device
                self._adamw.state[parameter] = {
                    "step": torch.tensor(float(steps), device=at if self._fused else None),
                    "exp_avg": state[f"mean.{name}"].to(at, copy=True),
                    "exp_avg_sq": state[f"square.{name}"].to(at, copy=True),
                }


class InBfloat16(Optimiser):
    """Moments of 8 bits; its roundings are a function of the seed and the step's number."""

    def __init__(self, parameters: Parameters, seed: int) -> None:
        self._parameters = parameters
        self._seed = seed
        self._moments: dict[str, tuple[Moment, Moment]] = {}

    @torch.no_grad()
    def step(self, rate: float, number: int) -> None:
        some = next(iter(self._parameters.values()))
        random = torch.Generator(some.device).manual_seed(self._seed * 1_000_003 + number + _first_number(some))
        bias = [1 - beta ** (number + 1) for beta in BETAS]
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            if name not in self._moments:
                self._moments[name] = (Moment.zeros(parameter, signed=True), Moment.zeros(parameter, signed=False))
            weights, gradients = held(parameter).view(-1), held(parameter.grad).reshape(-1)
            for start in range(0, weights.numel(), STEP_NUMBERS):
                part = slice(start, start + STEP_NUMBERS)
                gradient = gradients[part].float()
                mean, square = (moment.read(part) for moment in self._moments[name])
                mean.lerp_(gradient, 1 - BETAS[0])
                square.lerp_(gradient.square_(), 1 - BETAS[1])
                for moment, value in zip(self._moments[name], (mean, square), strict=True):
                    moment.write(part, value)
                change = mean.div_(bias[0]).div_(square.div_(bias[1]).sqrt_().add_(EPSILON))
                weights[part] = rounded(weights[part].float().sub_(change, alpha=rate), random)
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        return {
            f"{kind}.{name}{part}": tensor
            for name, moments in self._moments.items()
            for kind, moment in zip(("mean", "square"), moments, strict=True)
            for part, tensor in moment.parts(self._parameters[name])
        }

    def restore(self, state: Mapping[str, Tensor], steps: int) -> None:
        for name, parameter in self._parameters.items():
            if f"mean.{name}" in state:
                mean, square = (
                    Moment.of(state[kept], state.get(f"{kept}{SCALES}"), parameter, signed=kept.startswith("mean."))
                    for kept in (f"mean.{name}", f"square.{name}")
                )
                self._moments[name] = (mean, square)


@dataclass(frozen=True)
class Moment:
    """A moment of every number of a tensor, laid out flat: codes (numbers,) with scales (numbers / BLOCK,), or, of a
    small tensor or one that does not split into blocks, the numbers themselves without scales.
    """

    values: Tensor
    scales: Tensor | None
    signed: bool

    @classmethod
    def zeros(cls, parameter: Tensor, *, signed: bool) -> Moment:
        numbers, at = held(parameter).numel(), parameter.device
        # Of a sharded tensor no block lies in two rows, so that it can be cut anew.
        whole = _row_numbers(parameter) if isinstance(parameter, DTensor) else numbers
        if parameter.numel() < LEAST_NUMBERS or whole % BLOCK:
            return cls(torch.zeros(numbers, device=at), None, signed)
        zero = int(torch.bucketize(torch.zeros(()), _borders(signed, torch.device("cpu"))))
        codes = torch.full((numbers,), zero, dtype=torch.uint8, device=at)
        return cls(codes, torch.zeros(numbers // BLOCK, device=at), signed)

    @classmethod
    def of(cls, values: Tensor, scales: Tensor | None, parameter: Tensor, *, signed: bool) -> Moment:
        """As `parts` gave it, in copies."""

        def flat(kept: Tensor) -> Tensor:
            return held(kept).to(parameter.device, copy=True).view(-1)

        return cls(flat(values), None if scales is None else flat(scales), signed)

    def rows_of(self, parameter: DTensor) -> Iterator[tuple[str, Tensor]]:
        """What `parts` gives of this rank's rows, of a moment of all numbers of `parameter`.

        Where blocks lie across rows, these numbers get float32.
        """
        rows = parameter.shape[0]
        whole = self
        if self.scales is not None and len(self.scales) % rows:
            whole = Moment(self.read(slice(0, len(self.values))), None, self.signed)
        start = min(rows, parameter.device_mesh.get_rank() * math.ceil(rows / parameter.device_mesh.size()))
        own = slice(start, start + held(parameter).shape[0])

        def cut(tensor: Tensor) -> Tensor:
            return tensor.view(rows, -1)[own].reshape(-1)

        share = Moment(cut(whole.values), None if whole.scales is None else cut(whole.scales), self.signed)
        return share.parts(parameter)

    def read(self, part: slice) -> Tensor:
        """Of the numbers in `part`, which begins with a block: a copy in float32."""
        if self.scales is None:
            return self.values[part].clone()
        codes = _codes(self.signed, self.values.device)[self.values[part].int()]
        return codes.view(-1, BLOCK).mul_(self.scales[_blocks(part)].unsqueeze(1)).view(-1)

    def write(self, part: slice, value: Tensor) -> None:
        """The reverse: each number gets the code that is nearest to its share of the largest in its block."""
        if self.scales is None:
            self.values[part] = value
            return
        blocks = value.view(-1, BLOCK)
        scales = blocks.abs().amax(1)
        shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        self.scales[_blocks(part)] = scales
        borders = _borders(self.signed, value.device)
        self.values[part] = torch.bucketize(shares, borders, out_int32=True).view(-1).to(torch.uint8)

    def parts(self, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What there is to keep, with what its name ends in; sharded as `parameter` is."""
        for ending, tensor, unit in (("", self.values, 1), (SCALES, self.scales, BLOCK)):
            if tensor is not None and isinstance(parameter, DTensor):
                rows = tensor.view(held(parameter).shape[0], _row_numbers(parameter) // unit)
                yield ending, sharded_rows(rows, parameter)
            elif tensor is not None:
                yield ending, tensor


def _row_numbers(parameter: Tensor) -> int:
    return parameter.numel() // parameter.shape[0]


def held(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: all, or its share where it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_rows(own: Tensor, like: DTensor) -> DTensor:
    """This rank's rows of a tensor that is cut into rows as `like` is."""
    size = torch.Size((like.shape[0], *own.shape[1:]))
    stride = torch.empty(size, device="meta").stride()
    return DTensor.from_local(own, like.device_mesh, like.placements, run_check=False, shape=size, stride=stride)


def _first_number(parameter: Tensor) -> int:
    """Where this rank's numbers of random roundings begin to differ from those of others; 0 of the first rank."""
    return parameter.device_mesh.get_rank() * RANKS_APART if isinstance(parameter, DTensor) else 0


def _blocks(part: slice) -> slice:
    return slice(part.start // BLOCK, part.stop // BLOCK)


@cache
def _codes(signed: bool, device: torch.device) -> Tensor:
    """The numbers between −1 and 1, or 0 and 1, that the 256 codes mean, ascending: the paper's dynamic tree.

    In each of seven decades from 10⁻⁶ to 1 lie twice as many as in the one below, evenly; beside them are 0 and 1.
    """
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float64)
        numbers = (10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
        found += [*numbers, *((-number for number in numbers) if signed else ())]
    return torch.tensor(sorted(found), dtype=torch.float32, device=device)


@cache
def _borders(signed: bool, device: torch.device) -> Tensor:
    """Half-way between neighbouring codes."""
    codes = _codes(signed, device)
    return (codes[:-1] + codes[1:]) / 2


def rounded(exact: Tensor, random: torch.Generator) -> Tensor:
    """float32 numbers as one of their two neighbours in bfloat16, on average what they were."""
    noise = torch.randint(1 << 16, exact.shape, dtype=torch.int32, device=exact.device, generator=random)
    bits = exact.view(torch.int32).add_(noise).bitwise_and_(-(1 << 16))  # A carry goes into the upper half.
    return bits.view(torch.float32).to(torch.bfloat16)
