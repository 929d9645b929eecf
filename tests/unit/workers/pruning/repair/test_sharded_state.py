"""States of healing on several devices, seen from each of the ranks in turn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from workers.pruning.repair.optimiser import InBfloat16, Moment, held
from workers.pruning.repair.sharded import Ranks
from workers.pruning.repair.sharded_state import load_shards, load_tensor, load_whole, save_shards


@contextmanager
def share_of(whole: Tensor, rank: int, size: int) -> Iterator[DTensor]:
    """What a rank has of a tensor, whose other ranks do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        mesh = init_device_mesh("cpu", (size,))
        chunk = math.ceil(len(whole) / size)
        own = whole[rank * chunk : (rank + 1) * chunk].clone()
        yield DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
    finally:
        dist.destroy_process_group()


@contextmanager
def one_rank(folder: Path) -> Iterator[Ranks]:
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=(folder / "group").as_uri(), rank=0, world_size=1)
    try:
        saving = dist.new_group(backend="gloo")
        assert saving is not None
        yield Ranks(init_device_mesh("cpu", (1,)), saving)
    finally:
        dist.destroy_process_group()


def sharded(tensor: Tensor, ranks: Ranks) -> nn.Parameter:
    return nn.Parameter(DTensor.from_local(tensor.clone(), ranks.mesh, [Shard(0)], run_check=False))


def filled(parameter: Tensor) -> Moment:
    moment = Moment.zeros(parameter, signed=True)
    moment.write(slice(0, parameter.numel()), torch.randn(parameter.numel()))
    return moment


@pytest.mark.parametrize(
    ("rows", "columns", "coded"),
    [(10, 512, True), (16, 384, False), (5, 8, False), (2, 4096, True)],
    ids=["blocks-in-rows", "blocks-across-rows", "small", "a-rank-without-rows"],
)
def test_moments_that_one_device_laid_out_are_cut_as_the_rows_of_weights_are(
    rows: int, columns: int, coded: bool
) -> None:
    torch.manual_seed(0)
    whole = torch.zeros(rows, columns, dtype=torch.bfloat16)
    moment = filled(whole)
    expected = moment.read(slice(0, whole.numel()))
    found = []
    for rank in range(3):
        with share_of(whole, rank, 3) as own:
            parts = dict(moment.rows_of(own))
            assert (".scales" in parts) == coded
            assert parts[""].shape[0] == rows
            share = Moment.of(parts[""], parts.get(".scales"), own, signed=True)
            found.append(share.read(slice(0, held(own).numel())))
    assert torch.equal(torch.cat(found), expected)


def test_ranks_round_their_shares_by_numbers_of_their_own_and_the_first_as_one_device_does() -> None:
    whole = torch.full((4, 512), 1.0, dtype=torch.bfloat16)

    def stepped(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        parameter.grad = gradient
        InBfloat16({"a": parameter}, seed=3).step(1e-3, 0)
        return held(parameter.data).clone()

    alone = stepped(nn.Parameter(whole.clone()), torch.ones_like(whole))
    shares = []
    for rank in range(2):
        with share_of(whole, rank, 2) as own:
            shares.append(stepped(nn.Parameter(own), torch.ones_like(own)))
    assert torch.equal(shares[0], alone[:2])
    assert not torch.equal(shares[1], shares[0])


def test_a_state_is_read_by_ranks_and_by_a_process_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensor, way = torch.randn(6, 4), torch.tensor([0, 1, 2])
    with one_rank(tmp_path) as ranks:
        parameters = {"a": sharded(tensor, ranks)}
        save_shards({"weight.a": parameters["a"].detach(), "way": way}, tmp_path / "state", ranks)
        again = load_shards(tmp_path / "state", parameters, ranks)
    assert isinstance(again["weight.a"], DTensor)
    assert torch.equal(held(again["weight.a"]), tensor)
    alone = load_whole(tmp_path / "state")
    assert torch.equal(alone["weight.a"], tensor)
    assert torch.equal(alone["way"], way)
    kept = load_tensor(tmp_path / "state", "way")
    assert kept is not None
    assert torch.equal(kept, way)
    assert load_tensor(tmp_path / "state", "no such") is None


def test_what_one_device_kept_is_read_by_ranks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parameter = torch.zeros(8, 512, dtype=torch.bfloat16)
    parts = {f"mean.a{ending}": part for ending, part in filled(parameter).parts(parameter)}
    state = {"weight.a": torch.randn(8, 512).bfloat16(), **parts, "progress": torch.ones(5, dtype=torch.float64)}
    (tmp_path / "state").mkdir()
    save_file(state, tmp_path / "state" / "heal-prefill.safetensors")
    with one_rank(tmp_path) as ranks:
        found = load_shards(tmp_path / "state", {"a": sharded(parameter, ranks)}, ranks)
        assert all(torch.equal(held(found[name]).flatten(), tensor.flatten()) for name, tensor in state.items())
        assert isinstance(found["mean.a"], DTensor)
