"""Vision-language models: the text decoder as a model of its own, and a pruned one put back in its place.

A checkpoint of a whole model holds its decoder's tensors under a prefix of its own (`language_model.model.`,
`model.language_model.`, `model.text_model.`). It is found by their names alone; every other tensor is copied as it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from pdtrim.contract.architectures import TEXT_MODELS, text_part
from workers.pruning.model.blocks import block_stack
from workers.pruning.model.building import building
from workers.pruning.model.checkpoint import (
    COPIED,
    BrokenCheckpoint,
    SourceTensors,
    built_by,
    count_tensors,
    write_json,
    write_shards,
)
from workers.pruning.model.configuration import config_of
from workers.pruning.model.speculation import is_extra

TEXT = "text_config"
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""What reads images, beside the files of every model."""
ROTARY = ("mrope_section", "mrope_interleaved")
"""Of rotary embeddings in three dimensions, which are one where there is text alone."""


@dataclass(frozen=True)
class Composite:
    """A folder with a whole model, and its text decoder in it."""

    folder: Path
    config: Mapping[str, Any]
    """`config.json` of the decoder as a model of its own."""
    names: Mapping[str, str]
    """Tensor of the whole model's checkpoint → what the decoder as a model of its own calls it."""
    blocks: str
    """What the names of the decoder's blocks begin with in that model, as in `model.layers.`."""

    @classmethod
    def of(cls, folder: Path, check: Callable[[], None] = lambda: None) -> Composite | None:
        """None for a folder with a model of text alone. Raises: BrokenCheckpoint, ImpossibleModel."""
        given = json.loads((folder / "config.json").read_text())
        if text_part(given) is None:
            return None
        config = text_json(given)
        with building(check, tensors=count_tensors(folder)), torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(config), trust_remote_code=False)
        stack = block_stack(model)
        base = f"{stack.path.partition('.')[0]}."
        stored = SourceTensors.of(folder).files.keys()
        prefix = _prefix(folder, model, base, stack.prefix, stored)
        blocks = prefix + stack.prefix.removeprefix(base)
        wanted = {name.removeprefix(base) for name, _ in model.named_parameters() if name.startswith(base)}
        names = {
            name: base + name.removeprefix(prefix)
            for name in stored
            if name.startswith(blocks) or (name.startswith(prefix) and name.removeprefix(prefix) in wanted)
        }
        for head in (name for name, _ in model.named_parameters() if not name.startswith(base)):
            found = [name for name in stored if name == head or name.endswith(f".{head}")]
            if len(found) != 1:
                raise BrokenCheckpoint(f"{folder} should hold one tensor {head}, and holds {len(found)}")
            names[found[0]] = head
        return cls(folder, config, names, stack.prefix)

    def write_text(self, target: Path, check: Callable[[], None] = lambda: None) -> None:
        """The decoder as a model of its own in the new folder `target`, in shards like those of the whole model."""
        target.mkdir(parents=True)
        write_json(target / "config.json", self.config)
        for path in (path for pattern in (*COPIED, "README.md") for path in self.folder.glob(pattern)):
            place = target / path.relative_to(self.folder)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place)
        source = SourceTensors.of(self.folder)

        def tensor(name: str) -> Tensor:
            check()
            return source.read(name)

        ordered = sorted(self.names, key=lambda name: (str(source.files[name]), name))
        largest = max(path.stat().st_size for path in set(source.files.values()))
        write_shards(target, {name: self.names[name] for name in ordered}, tensor, largest)

    def write_whole(
        self, text: Path, target: Path, kept: Sequence[int], check: Callable[[], None] = lambda: None
    ) -> None:
        """The whole model in the new folder `target`: its decoder as it lies in `text`, with the blocks `kept`."""
        target.mkdir(parents=True)
        write_json(target / "config.json", self._pruned_json(json.loads((text / "config.json").read_text())))
        for pattern in (*COPIED, *PROCESSORS):
            for path in self.folder.glob(pattern):
                place = target / path.relative_to(self.folder)
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, place)
        for name in ("pdtrim.json", "README.md"):
            shutil.copyfile(text / name, target / name)
        source, pruned = SourceTensors.of(self.folder), SourceTensors.of(text)
        layer = {block: number for number, block in enumerate(kept)}
        renamed: dict[str, str] = {}
        places: dict[str, str] = {}
        for name in sorted(source.files, key=lambda name: (str(source.files[name]), name)):
            own = self.names.get(name)
            if own is None and is_extra(name):
                continue
            if own is None or not own.startswith(self.blocks):
                renamed[name], places[name] = name, own or ""
                continue
            number, _, rest = own.removeprefix(self.blocks).partition(".")
            if int(number) in layer:
                before = name.removesuffix(f"{number}.{rest}")
                renamed[name] = f"{before}{layer[int(number)]}.{rest}"
                places[name] = f"{self.blocks}{layer[int(number)]}.{rest}"

        def tensor(name: str) -> Tensor:
            check()
            return pruned.read(places[name]) if places[name] else source.read(name)

        write_shards(target, renamed, tensor, max(path.stat().st_size for path in set(source.files.values())))

    def _pruned_json(self, text: Mapping[str, Any]) -> dict[str, Any]:
        """The whole model's `config.json` where its decoder's, as a model of its own, is `text`."""
        given: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        # Qwen2.5-VL is published with the decoder's entries beside those of the whole.
        part = given.get(TEXT, given)
        for key in self.config.keys() - text.keys():
            part.pop(key, None)
        part |= {key: value for key, value in text.items() if self.config.get(key) != value}
        return given


def _prefix(folder: Path, model: PreTrainedModel, base: str, blocks: str, stored: Collection[str]) -> str:
    """What the names of the decoder's tensors begin with in a whole model's checkpoint. Raises: BrokenCheckpoint."""
    names = [name.removeprefix(base) for name, _ in model.named_parameters() if name.startswith(base)]
    first = next(name for name in names if name.startswith(blocks.removeprefix(base)))
    ends = {name.removesuffix(first) for name in stored if name == first or name.endswith(f".{first}")}
    found = [end for end in ends if all(f"{end}{name}" in stored for name in names)]
    if len(found) != 1:
        raise BrokenCheckpoint(f"the tensors of the text decoder are not found in {folder}")
    return found[0]


def load_whole(
    folder: Path, *, dtype: torch.dtype | None, device: torch.device, check: Callable[[], None] = lambda: None
) -> PreTrainedModel:
    """A vision-language model, in evaluation mode; as `load_checkpoint`. Raises: BrokenCheckpoint, ImpossibleModel."""
    model = built_by(AutoModelForImageTextToText, folder, dtype, check)
    torch.nn.Module.to(model, device)
    model.eval().requires_grad_(False)
    return model


def text_json(given: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a whole model's text decoder as a model of its own. Raises: ImpossibleModel."""
    whole = config_of(given)
    text = whole.get_text_config()
    found = text.to_dict()
    if (own := TEXT_MODELS.get(str(text.model_type))) is not None:
        found["model_type"] = own
        if isinstance(rope := found.get("rope_parameters"), dict):
            found["rope_parameters"] = {key: value for key, value in rope.items() if key not in ROTARY}
    found["tie_word_embeddings"] = whole.tie_word_embeddings
    for key in ("dtype", "torch_dtype"):
        if given.get(key) is not None:
            found["dtype"] = given[key]
    # As a file would give it: keys are text.
    encoded: dict[str, Any] = json.loads(json.dumps(PretrainedConfig._encode_special_floats(found)))
    return encoded
