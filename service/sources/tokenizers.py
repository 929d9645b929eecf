"""Whether a model has a tokenizer that can be used, as far as its files tell without the library that reads it."""

from __future__ import annotations

import re

from service.sources.errors import UnreadableSource
from service.sources.files import ModelFiles
from service.sources.weights import read_json

WHOLE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
VOCABULARIES = re.compile(r"tokenizer\.json|tekken\.json|vocab\.(json|txt)|[^/]+\.(model|tiktoken)")
"""Files of which each holds a tokenizer's vocabulary."""
MAX_READ_BYTES = 4 << 20
"""Of a larger `tokenizer.json` only the worker knows whether it is one."""
LARGEST_POINTER = 1024
POINTER = b"version https://git-lfs"
REMEDY = "Save the tokenizer beside the weights with tokenizer.save_pretrained"


def check_tokenizer(files: ModelFiles) -> None:
    """Raises: UnreadableSource for a model without a tokenizer, or with one that shows at once that it is none."""
    names = files.names()
    found = [name for name in names if VOCABULARIES.fullmatch(name)]
    if not found:
        raise UnreadableSource(f"{files} has no tokenizer: neither {WHOLE} nor tokenizer.model. {REMEDY}.")
    for name in found:
        if files.size(name) <= LARGEST_POINTER and files.read(name, len(POINTER)) == POINTER:
            raise UnreadableSource(f"{name} of {files} is a Git LFS pointer in place of the file: run git lfs pull.")
    if WHOLE not in found:
        _check_settings(files)
    elif files.size(WHOLE) <= MAX_READ_BYTES and not isinstance(
        read_json(files, WHOLE, MAX_READ_BYTES).get("model"), dict
    ):
        raise UnreadableSource(f"{WHOLE} of {files} describes no tokenizer: it has no model. {REMEDY}.")


def _check_settings(files: ModelFiles) -> None:
    """That a tokenizer that the library makes of other files needs no code of its own."""
    if SETTINGS not in files.names():
        return
    code = read_json(files, SETTINGS, MAX_READ_BYTES).get("auto_map")
    if isinstance(code, dict) and code.get("AutoTokenizer"):
        raise UnreadableSource(
            f"The tokenizer of {files} needs code of its own, by auto_map in {SETTINGS}, which is never run here. Give "
            f"the model with a {WHOLE}."
        )
