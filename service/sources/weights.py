"""Which files make up a model's weights, and whether they can be believed: names and index, then every header."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection, Mapping
from typing import Any

from service.sources.errors import UnreadableSource
from service.sources.files import FolderFiles, ModelFiles
from service.sources.safetensors_header import LENGTH_BYTES, InvalidHeader, TensorInfo, header_bytes, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
MAX_INDEX_BYTES = 64 << 20
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
REMEDY = "Download or convert it again, with safetensors or transformers"


def weight_names(files: ModelFiles) -> list[str]:
    """The safetensors files that make up the model, as transformers would choose them.

    Raises: UnreadableSource, also for pickles and adapters.
    """
    names = set(files.names())
    if ADAPTER in names:
        # transformers would load the adapter too, pickled or not, and prune something else than the weights here.
        raise UnreadableSource(f"{files} has an {ADAPTER}. Merge the adapter into the model, and give that.")
    if SINGLE in names:
        return [SINGLE]
    if INDEX not in names:
        if pickles := sorted(name for name in names if name.endswith(PICKLES)):
            raise UnreadableSource(
                f"{files} has only pickle weights ({', '.join(pickles[:5])}), which can run code when they are loaded. "
                "Convert them to safetensors."
            )
        raise UnreadableSource(f"{files} has neither {SINGLE} nor {INDEX}.")
    shards = sorted(set(_weight_map(files).values()))
    for shard in shards:
        if shard.endswith(PICKLES):
            raise UnreadableSource(
                f"{INDEX} of {files} names {shard!r}, a pickle, which can run code when it is loaded. Convert the "
                "model to safetensors."
            )
        if "/" in shard or not shard.endswith(".safetensors"):
            raise UnreadableSource(f"{INDEX} of {files} names {shard!r}, which is no safetensors file beside it.")
    if missing := [shard for shard in shards if shard not in names]:
        raise UnreadableSource(f"{files} lacks {len(missing)} of {len(shards)} shards, the first is {missing[0]}.")
    return shards


def indexed_names(files: ModelFiles) -> Collection[str]:
    """The tensors that the model's index lists; none where all are in one file. Raises: UnreadableSource."""
    return () if SINGLE in files.names() else _weight_map(files).keys()


def indexed_bytes(files: ModelFiles) -> int | None:
    """The bytes of all tensors, as the model's index says; None where it does not. Raises: UnreadableSource."""
    if SINGLE in files.names():
        return None
    metadata = read_json(files, INDEX, MAX_INDEX_BYTES).get("metadata")
    found = metadata.get("total_size") if isinstance(metadata, dict) else None
    return found if type(found) is int and found > 0 else None


def check_weights(files: FolderFiles) -> dict[str, TensorInfo]:
    """Every tensor in a folder, by the headers of its weight files, which are held against the index.

    Raises: UnreadableSource.
    """
    shards = weight_names(files)
    index = {} if shards == [SINGLE] else _weight_map(files)
    held: dict[str, dict[str, TensorInfo]] = {}
    for shard in shards:
        try:
            with files.open(shard) as file:
                held[shard] = read_header(file, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise UnreadableSource(f"{shard} of {files} cannot be read: {error.strerror}.") from error
        except InvalidHeader as error:
            raise UnreadableSource(f"{shard} of {files} is no safetensors file: {error}. {REMEDY}.") from error
        for tensor in sorted(held[shard] & index.keys()):
            if index[tensor] != shard:
                raise UnreadableSource(
                    f"{shard} of {files} holds the tensor {tensor!r}, which is in {index[tensor]} by {INDEX}. {REMEDY}."
                )
    for tensor, shard in index.items():
        if tensor not in held[shard]:
            raise UnreadableSource(
                f"{shard} of {files} lacks the tensor {tensor[:80]!r} that {INDEX} says it holds. {REMEDY}."
            )
    return {name: tensor for tensors in held.values() for name, tensor in tensors.items()}


def single_header(files: ModelFiles, most: int) -> dict[str, TensorInfo] | None:
    """Every tensor of a model that is a single file; None where it is several, or has a header of over `most` bytes.

    Raises: UnreadableSource.
    """
    if SINGLE not in files.names():
        return None
    size = files.size(SINGLE)
    try:
        length = LENGTH_BYTES + header_bytes(io.BytesIO(files.read(SINGLE, LENGTH_BYTES)), size)
        return None if length > most else read_header(io.BytesIO(files.read(SINGLE, length)), size)
    except InvalidHeader as error:
        raise UnreadableSource(f"{SINGLE} of {files} is no safetensors file: {error}. {REMEDY}.") from error


def headers_size(files: FolderFiles) -> int:
    """Bytes of all headers of the weight files in a folder. Raises: UnreadableSource."""
    total = 0
    for shard in weight_names(files):
        try:
            total += header_bytes(io.BytesIO(files.read(shard, LENGTH_BYTES)), files.size(shard))
        except InvalidHeader as error:
            raise UnreadableSource(f"{shard} of {files} is no safetensors file: {error}. {REMEDY}.") from error
    return total


def read_json(files: ModelFiles, name: str, limit: int) -> dict[str, Any]:
    """A JSON object in a file of at most `limit` bytes. Raises: UnreadableSource."""
    if name not in files.names():
        raise UnreadableSource(f"{files} has no {name}; a model is a folder as transformers saves it.")
    if (size := files.size(name)) > limit:
        raise UnreadableSource(f"{name} of {files} has {size} bytes; more than {limit} are not read.")
    try:
        content = json.loads(files.read(name, limit))
    except (ValueError, RecursionError) as error:
        raise UnreadableSource(f"{name} of {files} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UnreadableSource(f"{name} of {files} is not a JSON object.")
    return content


def _weight_map(files: ModelFiles) -> Mapping[str, str]:
    """The shard of each tensor."""
    mapped = read_json(files, INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(mapped, dict) or not mapped or not all(isinstance(shard, str) for shard in mapped.values()):
        raise UnreadableSource(f"{INDEX} of {files} has no weight_map from tensors to files.")
    return mapped
