"""The state of healing on several devices: a folder of safetensors files, one of each rank, by torch's distributed
checkpoints, from which as many ranks as there are next time read their shares, or one process all.

The one file that healing on one device keeps is such a folder's content too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from workers.pruning.repair.optimiser import SCALES, Moment, sharded_rows
from workers.pruning.repair.sharded import Ranks

OF_PARAMETERS = ("weight.", "best.", "mean.", "square.")
"""What the names of a state begin with that has a tensor for each parameter."""


def save_shards(state: Mapping[str, Tensor], folder: Path, ranks: Ranks) -> None:
    """Write this rank's shares into `folder`, which holds nothing else; every rank has to."""
    state_dict_saver.save(
        dict(state),
        storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
        process_group=ranks.saving,
    )


def load_shards(folder: Path, parameters: Mapping[str, nn.Parameter], ranks: Ranks) -> dict[str, Tensor]:
    """A state as `train` goes on from it on this rank, whose sharded parameters are given; every rank has to ask."""
    reader = HuggingFaceStorageReader(str(folder))
    state: dict[str, Tensor] = {}
    flat: dict[str, nn.Parameter] = {}
    for name, stored in _tensors(reader).items():
        parameter = parameters.get(_parameter_of(name))
        if parameter is None:
            state[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
        elif stored.size[0] == parameter.shape[0]:
            state[name] = _empty_share(parameter, stored.size, stored.properties.dtype)
        else:
            flat[name] = parameter
    state_dict_loader.load(state, storage_reader=reader, process_group=ranks.saving)
    return state | _cut(folder, flat)


def load_whole(folder: Path) -> dict[str, Tensor]:
    """The same for a process by itself, whose parameters are whole."""
    reader = HuggingFaceStorageReader(str(folder))
    state = {name: torch.empty(stored.size, dtype=stored.properties.dtype) for name, stored in _tensors(reader).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        state_dict_loader.load(state, storage_reader=reader, no_dist=True)
    return state


def load_tensor(folder: Path, name: str) -> Tensor | None:
    """One tensor of a state that is not sharded."""
    for path in folder.iterdir():
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118  (the handle is no mapping)
                found: Tensor = file.get_tensor(name)
                return found
    return None


def _tensors(reader: HuggingFaceStorageReader) -> dict[str, TensorStorageMetadata]:
    return cast(dict[str, TensorStorageMetadata], reader.read_metadata().state_dict_metadata)


def _parameter_of(name: str) -> str:
    prefix = next((prefix for prefix in OF_PARAMETERS if name.startswith(prefix)), None)
    return "" if prefix is None else name.removeprefix(prefix).removesuffix(SCALES)


def _empty_share(parameter: nn.Parameter, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """Of a tensor whose rows are cut as those of `parameter` are."""
    data = cast(DTensor, parameter.data)
    return sharded_rows(torch.empty((data.to_local().shape[0], *size[1:]), dtype=dtype), data)


def _cut(folder: Path, flat: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Moments of 8 bits that one device laid out flat, as this rank's rows have them."""
    if not flat:
        return {}
    found: dict[str, Tensor] = {}
    (path,) = folder.iterdir()
    with safe_open(path, framework="pt") as file:
        for name in (name for name in flat if not name.endswith(SCALES)):
            data = cast(DTensor, flat[name].data)
            scales = file.get_tensor(f"{name}{SCALES}") if f"{name}{SCALES}" in flat else None
            moment = Moment(file.get_tensor(name), scales, signed=name.startswith("mean."))
            for ending, share in moment.rows_of(data):
                found[f"{name}{ending}"] = share
    return found
