from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from workers.pruning.repair.optimiser import InBfloat16, InFloat32, Moment, optimiser_of, rounded


def parameters(dtype: torch.dtype, *, rows: int = 64) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (rows, 64), "norm": (7,)}
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {name: nn.Parameter(tensor) for name, tensor in made.items()}


def trained(
    kind: str, steps: range, state: dict[str, Tensor] | None, given: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    optimiser = optimiser_of(given, seed=3)
    assert type(optimiser).__name__ == kind
    if state is not None:
        optimiser.restore(state, steps.start)
    for step in steps:
        torch.stack([(parameter.float() ** 2).sum() for parameter in given.values()]).sum().backward()
        optimiser.step(0.01, step)
        assert all(parameter.grad is None for parameter in given.values())
    return {name: tensor.clone() for name, tensor in optimiser.state().items()}


def test_each_precision_has_its_own_and_goes_on_with_the_same_bits() -> None:
    for dtype, kind in ((torch.float32, InFloat32), (torch.bfloat16, InBfloat16)):
        unbroken, broken = parameters(dtype), parameters(dtype)
        start = {name: parameter.detach().clone() for name, parameter in unbroken.items()}
        trained(kind.__name__, range(6), None, unbroken)
        state = trained(kind.__name__, range(3), None, broken)
        resumed = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in broken.items()}
        trained(kind.__name__, range(3, 6), state, resumed)
        for name in start:
            assert torch.equal(resumed[name], unbroken[name])
            assert unbroken[name].float().norm() < start[name].float().norm()


def test_moments_of_bfloat16_weights_take_two_bytes_a_number() -> None:
    state = trained("InBfloat16", range(1), None, parameters(torch.bfloat16))
    of_matrix = sum(tensor.nbytes for name, tensor in state.items() if "matrix" in name)
    assert of_matrix == 2 * (64 * 64 + 64 * 64 // 256 * 4)


def test_steps_in_bfloat16_are_near_those_in_float32() -> None:
    exact, rough = parameters(torch.float32), parameters(torch.bfloat16)
    start = exact["matrix"].detach().clone()
    for kind, given in (("InFloat32", exact), ("InBfloat16", rough)):
        trained(kind, range(20), None, given)
    moved = (exact["matrix"] - start).detach()
    assert float((rough["matrix"].float() - exact["matrix"]).detach().norm()) < 0.1 * float(moved.norm())


def test_a_large_tensor_is_changed_some_numbers_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.pruning.repair.optimiser.rounded", lambda exact, random: exact.to(torch.bfloat16))
    whole, in_parts = parameters(torch.bfloat16, rows=100), parameters(torch.bfloat16, rows=100)
    trained("InBfloat16", range(3), None, whole)
    monkeypatch.setattr("workers.pruning.repair.optimiser.STEP_NUMBERS", 512)
    trained("InBfloat16", range(3), None, in_parts)
    assert torch.equal(in_parts["matrix"], whole["matrix"])


def test_a_moment_in_8_bits_is_near_what_was_written() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(8192, generator=generator) * torch.logspace(-6, 2, 8192)
    for signed, written in ((True, values), (False, values.square())):
        moment = Moment.zeros(written, signed=signed)
        assert not moment.read(slice(0, 8192)).any()
        moment.write(slice(0, 4096), written[:4096])
        moment.write(slice(4096, 8192), written[4096:])
        largest = written.abs().view(-1, 256).amax(1, keepdim=True).expand(-1, 256).flatten()
        error = (moment.read(slice(0, 8192)) - written).abs()
        assert bool((error <= 0.08 * written.abs() + 1e-3 * largest).all())


def test_rounding_is_to_a_neighbour_and_right_on_average() -> None:
    exact = torch.tensor([1.0 + 1 / 512, -3.3, 1e-30, 0.0]).repeat(20_000, 1)
    found = rounded(exact.clone(), torch.Generator().manual_seed(0)).float()
    assert float(((found - exact).abs() / exact.abs().clamp(min=1e-38)).max()) < 1 / 128
    torch.testing.assert_close(found.mean(0), exact[0], rtol=2e-4, atol=0.0)
    assert len(found[:, 0].unique()) == 2


def test_steps_too_small_for_bfloat16_still_arrive_on_average() -> None:
    weights = {"matrix": nn.Parameter(torch.ones(256, 256, dtype=torch.bfloat16))}
    optimiser = optimiser_of(weights, seed=0)
    for step in range(20):
        weights["matrix"].grad = torch.ones_like(weights["matrix"])
        optimiser.step(1e-4, step)  # rounded to the nearest, each is lost: numbers below 1 lie 1/256 apart
    moved = 1 - float(weights["matrix"].detach().float().mean())
    assert abs(moved - 20 * 1e-4) < 2e-4


def test_torchs_own_random_numbers_are_left_as_they_were() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trained("InBfloat16", range(1), None, parameters(torch.bfloat16))
    assert torch.equal(torch.rand(3), expected)
