"""What a checkpoint brings for guessing tokens ahead: layers that predict further tokens (MTP), signs of a draft head.

Neither is read by a causal language model. MTP layers are left out of pruned checkpoints; a draft head lies elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from workers.pruning.model.configuration import EXTRA_LAYERS, config_of

MTP = re.compile(r"(?:^|\.)(?:mtp|nextn)[._]")
"""How Qwen, MiMo, ERNIE and others call these tensors."""
NUMBERED = re.compile(r"(?:^|\.)layers\.(\d+)\.")
"""DeepSeek and GLM number them on behind the last block."""
DRAFT = re.compile(r"[\w.-]{0,64}(?:eagle|medusa|draft|speculat|aux_hidden_state)[\w.-]{0,64}", re.IGNORECASE)
"""Keys of a configuration, and JSON files beside it, that are of a head that drafts tokens."""


def is_extra(name: str) -> bool:
    """Whether a checkpoint's tensor, which is none of its blocks' or its model's, is of an MTP layer by its name."""
    return MTP.search(name) is not None


def left_behind(folder: Path, tensors: Iterable[str]) -> list[str]:
    """What those who serve a pruned model should know of this in its source, in sentences.

    `tensors` are the names in the checkpoint. Raises: as `config_of`.
    """
    given = json.loads((folder / "config.json").read_text())
    return [*_about_layers(given, tensors), *_about_heads(given, folder)]


def _about_layers(given: Mapping[str, Any], tensors: Iterable[str]) -> Iterator[str]:
    config = config_of(given)
    behind = config.num_hidden_layers if any(getattr(config, key, None) for key in EXTRA_LAYERS) else None

    def is_behind(name: str) -> bool:
        number = NUMBERED.search(name)
        return behind is not None and number is not None and int(number[1]) >= behind

    if any(is_extra(name) or is_behind(name) for name in tensors):
        yield (
            "The dense model's layers for predicting further tokens (MTP) are left out: they were trained on its last "
            "hidden states. Serve without speculative decoding by them."
        )


def _about_heads(given: Mapping[str, Any], folder: Path) -> Iterator[str]:
    signs = [f"{key} in config.json" for key, value in sorted(given.items()) if value and DRAFT.fullmatch(key)]
    signs += [path.name for path in sorted(folder.glob("*.json")) if DRAFT.fullmatch(path.name)]
    if signs:
        yield (
            f"The source has a head that drafts tokens ({', '.join(signs)}). Such a head (EAGLE) reads the dense "
            "model's hidden states by layer numbers, which are others here: it does not fit the pruned model."
        )
