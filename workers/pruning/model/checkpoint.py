"""Write a pruned Hugging Face checkpoint by slicing the source's safetensors shards, one tensor in memory at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from workers.pruning.model.blocks import BlockStack, block_stack
from workers.pruning.model.building import ImpossibleModel, building
from workers.pruning.model.configuration import config_of, pruned_json, read_config
from workers.pruning.model.speculation import is_extra
from workers.pruning.model.width import Channels, check_channels, check_gated, intermediate_size, sliced_tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "*.model",  # tokenizer, spiece, sentencepiece.bpe, tiktoken
    "*.tiktoken",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "LICENCE*",
    "USE_POLICY*",
    "NOTICE*",
)
"""Patterns of what a server reads beside config and weights, and of what a licence may ask to pass on."""


class BrokenCheckpoint(ValueError):
    """The source's weights are missing, damaged or inconsistent; the message names the file and the tensor."""


@dataclass(frozen=True)
class SourceTensors:
    """The tensors of a safetensors checkpoint by name, each with the file that holds it."""

    files: Mapping[str, Path]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What the checkpoint calls each tensor of the model where that differs: several where the model stacks experts."""

    @classmethod
    def of(cls, folder: Path) -> SourceTensors:
        """Those that transformers would load. Raises: BrokenCheckpoint when there are none, or the index lies."""
        if (folder / SINGLE).is_file():
            return cls.in_file(folder / SINGLE)
        if (folder / INDEX).exists():
            weight_map = _weight_map(folder / INDEX)
            for name in sorted(set(weight_map.values())):
                if Path(name).name != name:
                    raise BrokenCheckpoint(f"{INDEX} points outside its folder: {name!r}")
                if not (folder / name).is_file():
                    raise BrokenCheckpoint(f"{INDEX} names the shard {name}, which is not in {folder}")
            return cls({tensor: folder / name for tensor, name in weight_map.items()})
        others = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
        found = f"; {', '.join(others)} are pickles, which are never loaded" if others else ""
        raise BrokenCheckpoint(f"{folder} has no {SINGLE} and no {INDEX}{found}")

    @classmethod
    def in_file(cls, path: Path) -> SourceTensors:
        """Every tensor of one safetensors file. Raises: BrokenCheckpoint."""
        with _opened(path, "its tensors") as file:
            return cls(dict.fromkeys(file.keys(), path))

    @property
    def one_to_one(self) -> bool:
        """Whether every tensor of the model is one of the checkpoint, so that `read` can give it."""
        return all(len(stored) == 1 for stored in self.names.values())

    def stored(self, name: str) -> tuple[str, ...]:
        """What the checkpoint calls the model's tensor `name`."""
        return self.names.get(name, (name,))

    def read(self, name: str) -> Tensor:
        """One tensor of the model or the checkpoint, on the CPU, as stored. Raises: BrokenCheckpoint."""
        (name,) = self.stored(name)
        if name not in self.files:
            raise BrokenCheckpoint(f"the source has no tensor {name}")
        path = self.files[name]
        with _opened(path, f"the tensor {name}") as file:
            if name not in file.keys():  # noqa: SIM118  (the handle is no mapping)
                raise _not_there(path, name)
            tensor: Tensor = file.get_tensor(name)
            return tensor


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return {str(tensor): str(file) for tensor, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenCheckpoint(f"{index} maps no tensors to files: {error!r}") from error


def _opened(path: Path, wanted: str) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise BrokenCheckpoint(
            f"{path.name} is not a whole safetensors file, so {wanted} cannot be read: {error}"
        ) from error


def empty_model(folder: Path, check: Callable[[], None] = lambda: None) -> PreTrainedModel:
    """The model that a checkpoint folder's configuration describes, without weights: everything is on `meta`.

    Before every part `check` is called, which may raise. Raises: BrokenCheckpoint, ImpossibleModel.
    """
    given = json.loads((folder / "config.json").read_text())
    try:
        with building(check, tensors=count_tensors(folder)), torch.device("meta"):
            config = config_of(given)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ImpossibleModel as error:
        # A table's missing key is all that transformers says of a value that it does not know.
        unknown = error.__cause__.args[0] if isinstance(error.__cause__, KeyError) else None
        if isinstance(unknown, str) and (fields := list(_fields(given, unknown))):
            raise ImpossibleModel(f"config.json has {fields[0]} = {unknown[:80]!r}, which is not known") from error
        raise
    return model


def _fields(config: Mapping[str, Any], value: str) -> Iterator[str]:
    """The fields of a configuration that have a value, in whatever depth."""
    for key, found in config.items():
        if found == value:
            yield key
        elif isinstance(found, dict):
            yield from _fields(found, value)


def count_tensors(folder: Path) -> int:
    """How many tensors a checkpoint has. Raises: BrokenCheckpoint."""
    return len(SourceTensors.of(folder).files)


def check_complete(folder: Path, check: Callable[[], None] = lambda: None) -> SourceTensors:
    """The tensors of a checkpoint that holds every weight of its model; transformers would make up missing ones.

    Calls `check` as `empty_model` does.
    Raises: BrokenCheckpoint naming a missing tensor and the file that should list it; ImpossibleModel naming a
    tensor that has another shape than the configuration says.
    """
    model = empty_model(folder, check)
    files = SourceTensors.of(folder).files
    stored = {name: _stored_names(model, name, parameter, files) for name, parameter in model.named_parameters()}
    needed = [part for parts in stored.values() for part in parts]  # of tied weights, the embedding alone
    if missing := sorted({name for name in needed if name not in files}, key=_natural):
        place = SINGLE if (folder / SINGLE).is_file() else INDEX
        raise BrokenCheckpoint(f"{place} in {folder} lacks {len(missing)} of the model's tensors, first {missing[0]}")
    _check_shapes(model, stored, files)
    return SourceTensors(files, {name: parts for name, parts in stored.items() if parts != (name,)})


def _check_shapes(model: PreTrainedModel, stored: Mapping[str, tuple[str, ...]], files: Mapping[str, Path]) -> None:
    """Hold the shapes that a configuration gives against those of the tensors, but for what is stored in parts."""
    wanted: dict[Path, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        if len(stored[name]) == 1:
            wanted[files[stored[name][0]]][stored[name][0]] = tuple(parameter.shape)
    for path, shapes in wanted.items():
        with _opened(path, f"the tensor {next(iter(shapes))}") as file:
            held = set(file.keys())
            for name, shape in shapes.items():
                if name not in held:
                    raise _not_there(path, name)
                if (found := tuple(file.get_slice(name).get_shape())) != shape:
                    raise ImpossibleModel(
                        f"config.json describes another model: {name} of {path.name} has the shape {found}, and "
                        f"would have {shape}"
                    )


def _not_there(path: Path, name: str) -> BrokenCheckpoint:
    return BrokenCheckpoint(f"{path.name} does not hold the tensor {name} that {INDEX} says it does")


def _stored_names(model: PreTrainedModel, name: str, parameter: Tensor, files: Mapping[str, Path]) -> tuple[str, ...]:
    """What a checkpoint calls a parameter: as the model does, as its architecture's checkpoints do, or without base."""
    if name in files:
        return (name,)
    published = tuple(revert_weight_conversion(model, {name: parameter}))
    bare = tuple(part.removeprefix(f"{model.base_model_prefix}.") for part in published)
    return bare if all(part in files for part in bare) else published


@dataclass(frozen=True)
class BlockNames:
    """How a checkpoint calls the tensors of its blocks: as the model does, without its first part, or otherwise."""

    pattern: re.Pattern[str]
    prefix: str
    """As the model in memory calls them."""

    @classmethod
    def of(cls, stack: BlockStack, stored: Mapping[str, tuple[str, ...]]) -> BlockNames:
        """`stored` has what the checkpoint calls tensors of the model, where that differs."""
        prefixes = {stack.prefix, stack.prefix.removeprefix(f"{stack.model.base_model_prefix}.")}
        for name, parts in stored.items():
            if name.startswith(stack.prefix):  # Nemotron-H has `backbone.layers.` in its files.
                number = name.removeprefix(stack.prefix).partition(".")[0]
                prefixes |= {part.partition(f".{number}.")[0] + "." for part in parts if f".{number}." in part}
        known = "|".join(re.escape(prefix) for prefix in sorted(prefixes))
        return cls(re.compile(rf"({known})(\d+)\.(.+)"), stack.prefix)

    def split(self, name: str) -> tuple[str, int, str] | None:
        """(prefix, block, rest) of a stored tensor's name; None when it belongs to no block."""
        match = self.pattern.fullmatch(name)
        return None if match is None else (match[1], int(match[2]), match[3])


def write_checkpoint(
    source: Path,
    target: Path,
    *,
    kept: Sequence[int],
    overrides: SourceTensors,
    pdtrim: Mapping[str, Any],
    model_card: str,
    zeroed: Collection[str] = (),
    kept_channels: Channels | None = None,
    max_shard_bytes: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write the model of folder `source` without the blocks not in `kept` to the new folder `target`.

    `overrides` replaces tensors, called as in the dense model, and is cast to the stored dtype; those that `zeroed`
    names are written as zeros. `kept_channels` names the MLP channels that stay in each kept block, by its dense index;
    overrides are then as narrow. `pdtrim` becomes `pdtrim.json` and `model_card` README.md. Memory holds one shard of
    at most `max_shard_bytes` (or one tensor), and no more than the source's largest file. Before every tensor and
    shard `check` is called, which may raise.

    Raises: BrokenCheckpoint; KeyError when an override, or what is zeroed, names no tensor of a kept block;
    UnsupportedArchitecture or ValueError when the channels do not fit the model.
    """
    # What the pruned model is: its configuration, checked before anything is written.
    config = pruned_json(json.loads((source / "config.json").read_text()), kept)
    model = empty_model(source, check)
    tensors = check_complete(source, check)
    names = BlockNames.of(block_stack(model), tensors.names)
    if kept_channels is not None:
        config["intermediate_size"] = _check_width(source, names, kept, kept_channels, config_of(config))

    # The small files: configuration, tokenizer and the like, and what is said of the checkpoint.
    target.mkdir(parents=True)
    write_json(target / "config.json", config)
    for path in (path for pattern in COPIED for path in source.glob(pattern)):
        copied = target / path.relative_to(source)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copied)
    write_json(target / "pdtrim.json", pdtrim)
    (target / "README.md").write_text(model_card)

    # Which tensors stay, under which names, and which of them were trained.
    own = {part for name, _ in model.named_parameters() for part in tensors.stored(name)}
    stay = {name: path for name, path in tensors.files.items() if name in own or not is_extra(name)}
    renamed = dict(_renamed(stay, names, kept))
    replaced = {part: name for name in overrides.files for part in tensors.stored(name)}
    silent = {part for name in zeroed for part in tensors.stored(name)}
    if unknown := (replaced.keys() | silent) - renamed.keys():
        raise KeyError(f"no kept tensor is called {min(unknown)}")
    largest = max(path.stat().st_size for path in set(tensors.files.values()))

    # Each tensor as it is written: read, narrowed, replaced. Held are the two stacks of a block's experts, whose parts
    # lie between each other in the source.
    @lru_cache(maxsize=2)
    def override(name: str) -> dict[str, Tensor]:
        parts = revert_weight_conversion(model, {name: overrides.read(name)})
        return dict(zip(tensors.stored(name), parts.values(), strict=True))

    def tensor(old: str) -> Tensor:
        check()
        value = tensors.read(old)
        found = names.split(old)
        if kept_channels is not None and found is not None:
            value = sliced_tensor(found[2], value, kept_channels[found[1]])
        if old in silent:
            return torch.zeros_like(value)
        return _override(old, override(replaced[old])[old], value) if old in replaced else value

    # The weights, shard by shard.
    write_shards(target, renamed, tensor, min(largest, max_shard_bytes or largest))


def _check_width(
    source: Path, names: BlockNames, kept: Sequence[int], channels: Channels, config: PretrainedConfig
) -> int:
    of_block: dict[int, list[str]] = {block: [] for block in kept}
    for found in map(names.split, SourceTensors.of(source).files):
        if found is not None and found[1] in of_block:
            of_block[found[1]].append(found[2])
    for block in kept:
        check_gated(of_block[block], block)
    return check_channels(channels, kept, intermediate_size(config))


def _renamed(files: Mapping[str, Path], names: BlockNames, kept: Sequence[int]) -> Iterator[tuple[str, str]]:
    """(name in the source, name in the target) of every tensor that stays, file by file and block by block."""
    position = {block: layer for layer, block in enumerate(kept)}
    for name in sorted(files, key=lambda name: (str(files[name]), _natural(name))):
        found = names.split(name)
        if found is None:
            yield name, name
        elif found[1] in position:
            yield name, f"{found[0]}{position[found[1]]}.{found[2]}"


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def write_shards(target: Path, renamed: Mapping[str, str], read: Callable[[str], Tensor], max_shard_bytes: int) -> None:
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        save_file(shard, target / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard, size = {}, 0

    for old, new in renamed.items():
        tensor = read(old)
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
    write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _override(name: str, new: Tensor, old: Tensor) -> Tensor:
    if new.shape != old.shape:
        raise BrokenCheckpoint(f"{name} has the shape {tuple(old.shape)} in the source, distilled {tuple(new.shape)}")
    return new.detach().to(device="cpu", dtype=old.dtype, copy=True).contiguous()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype in which a checkpoint's first weight is stored. Raises: BrokenCheckpoint."""
    tensors = SourceTensors.of(folder)
    return tensors.read(min(tensors.files)).dtype


def built_by(auto: Any, folder: Path, dtype: torch.dtype | None, check: Callable[[], None]) -> PreTrainedModel:
    """What a class of transformers' `Auto` family makes of a folder, on the CPU; as `load_checkpoint`."""
    with building(check, tensors=count_tensors(folder)):
        model: PreTrainedModel = auto.from_pretrained(
            folder,
            config=read_config(folder),
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    return model


def load_checkpoint(
    folder: Path, *, dtype: torch.dtype | None, device: torch.device, check: Callable[[], None] = lambda: None
) -> PreTrainedModel:
    """A causal language model in evaluation mode; safetensors only, no remote code; as stored when `dtype` is None.

    Before every part and every tensor `check` is called, which may raise. Raises: BrokenCheckpoint, ImpossibleModel.
    """
    model = built_by(AutoModelForCausalLM, folder, dtype, check)
    for block in block_stack(model).blocks:
        check()
        block.to(device)
    torch.nn.Module.to(model, device)
    model.eval().requires_grad_(False)
    return model
