"""Write a pruned Hugging Face checkpoint by slicing the source's safetensors shards, one tensor in memory at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from workers.pruning.blocks import BLOCK_PREFIX, pruned_config

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 4 << 30
COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
BLOCK_TENSOR = re.compile(re.escape(BLOCK_PREFIX) + r"(\d+)\.(.+)")


class BrokenCheckpoint(ValueError):
    """The source's weights are missing, damaged or inconsistent; the message names the file and the tensor."""


@dataclass(frozen=True)
class SourceTensors:
    """The tensors of a safetensors checkpoint by name, each with the file that holds it."""

    files: Mapping[str, Path]

    @classmethod
    def of(cls, folder: Path) -> SourceTensors:
        """Raises: BrokenCheckpoint when there are no safetensors, or the index lies."""
        if (folder / INDEX).exists():
            weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
            for name in set(weight_map.values()):
                if Path(name).name != name:
                    raise BrokenCheckpoint(f"{INDEX} points outside its folder: {name!r}")
                if not (folder / name).is_file():
                    raise BrokenCheckpoint(f"{INDEX} names the shard {name}, which is not in {folder}")
            return cls({tensor: folder / name for tensor, name in weight_map.items()})
        if (folder / SINGLE).is_file():
            return cls.in_file(folder / SINGLE)
        others = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
        found = f"; {', '.join(others)} are pickles, which are never loaded" if others else ""
        raise BrokenCheckpoint(f"{folder} has no {SINGLE} and no {INDEX}{found}")

    @classmethod
    def in_file(cls, path: Path) -> SourceTensors:
        """Every tensor of one safetensors file. Raises: BrokenCheckpoint."""
        with _opened(path) as file:
            return cls(dict.fromkeys(file.keys(), path))

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, as stored. Raises: BrokenCheckpoint."""
        if name not in self.files:
            raise BrokenCheckpoint(f"the source has no tensor {name}")
        path = self.files[name]
        with _opened(path) as file:
            if name not in file.keys():  # noqa: SIM118  (the handle is no mapping)
                raise BrokenCheckpoint(f"{path.name} does not hold the tensor {name} that {INDEX} says it does")
            tensor: Tensor = file.get_tensor(name)
            return tensor


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise BrokenCheckpoint(f"{path.name} is not a whole safetensors file: {error}") from error


def write_checkpoint(
    source: Path,
    target: Path,
    *,
    kept: Sequence[int],
    overrides: SourceTensors,
    pdtrim: Mapping[str, Any],
    model_card: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the model of folder `source` without the blocks not in `kept` to the new folder `target`.

    `overrides` replaces tensors, called as in the dense model, and is cast to the stored dtype. `pdtrim` becomes
    `pdtrim.json` and `model_card` README.md. Memory holds one shard of at most `max_shard_bytes` (or one tensor).

    Raises: BrokenCheckpoint; KeyError when an override names no tensor of a kept block.
    """
    target.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    _write_json(target / "config.json", pruned_config(config, kept))
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    _write_json(target / "pdtrim.json", pdtrim)
    (target / "README.md").write_text(model_card)

    tensors = SourceTensors.of(source)
    renamed = dict(_renamed(tensors.files, kept))
    if unknown := overrides.files.keys() - renamed.keys():
        raise KeyError(f"no kept tensor is called {min(unknown)}")
    _write_shards(target, tensors, renamed, overrides, max_shard_bytes)


def _renamed(names: Mapping[str, Path], kept: Sequence[int]) -> Iterator[tuple[str, str]]:
    """(name in the source, name in the target) of every tensor that stays, file by file and block by block."""
    position = {block: layer for layer, block in enumerate(kept)}
    for name in sorted(names, key=lambda name: (str(names[name]), _natural(name))):
        match = BLOCK_TENSOR.fullmatch(name)
        if match is None:
            yield name, name
        elif int(match[1]) in position:
            yield name, f"{BLOCK_PREFIX}{position[int(match[1])]}.{match[2]}"


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _write_shards(
    target: Path,
    tensors: SourceTensors,
    renamed: Mapping[str, str],
    overrides: SourceTensors,
    max_shard_bytes: int,
) -> None:
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        save_file(shard, target / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard, size = {}, 0

    for old, new in renamed.items():
        tensor = tensors.read(old)
        if old in overrides.files:
            tensor = _override(old, overrides.read(old), tensor)
        if shard and size + tensor.nbytes > max_shard_bytes:
            flush()
        shard[new] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()

    if len(shards) == 1:
        (target / "shard-0").rename(target / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (target / f"shard-{number}").rename(target / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _override(name: str, new: Tensor, old: Tensor) -> Tensor:
    if new.shape != old.shape:
        raise BrokenCheckpoint(f"{name} has the shape {tuple(old.shape)} in the source, distilled {tuple(new.shape)}")
    return new.detach().to(device="cpu", dtype=old.dtype, copy=True).contiguous()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype in which a checkpoint's first weight is stored. Raises: BrokenCheckpoint."""
    tensors = SourceTensors.of(folder)
    return tensors.read(min(tensors.files)).dtype
