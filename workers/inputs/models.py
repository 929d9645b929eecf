"""Models and tokenizers, loaded onto this worker's device."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from service.sources import UnreadableSource
from workers.pruning.model.blocks import block_stack
from workers.pruning.model.building import said
from workers.pruning.model.checkpoint import check_complete, load_checkpoint
from workers.pruning.model.composite import load_whole
from workers.pruning.model.sharding import load_placed, placement
from workers.pruning.model.streaming import WHOLE, BlockReader, BlockRoom, Cut, load_streamed, parameter_bytes
from workers.pruning.search.engine import windows_in

Check = Callable[[], None]
RESIDENT_SHARE = 0.7
"""Weights may take this much of the free memory; the rest is for hidden states and logits."""
RESIDENT_WALK_BYTES = 16 * 2**20
"""Hidden states of a walk on the CPU, whose caches like small chunks. Fixed: free memory must not change a plan."""
STREAMED_WALK_BYTES = 512 * 2**20
"""The same when blocks are read from disk: the more windows a walk carries, the fewer times every block is read."""

CONTAINER = Path("/sys/fs/cgroup")
"""Where Linux shows a container its own control group."""
ANCHOR_BYTES = 256 * 2**20
"""Hidden states held of the set that a search moves from, on the CPU."""
PROMPT_BYTES = 2 * 2**30
"""Keys and values of prompts that a search keeps, on the CPU."""


def device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def accelerators() -> list[torch.device]:
    """All that this worker sees."""
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def compute_dtype() -> torch.dtype:
    """bfloat16 on an accelerator; float32 on the CPU, unless a job has reason to do otherwise."""
    return torch.bfloat16 if device().type == "cuda" else torch.float32


def multiplies_bfloat16() -> bool:
    """Whether this worker's device has instructions for products of bfloat16 matrices."""
    if device().type == "cuda":
        return True
    can = torch.cpu.get_capabilities()
    return any(bool(can.get(name)) for name in ("amx_bf16", "avx512_bf16", "bf16"))


@contextmanager
def tensor_float_32() -> Iterator[None]:
    """While this lasts, accelerators round float32 numbers to TensorFloat-32 before they multiply matrices of them.

    For training, whose steps are noisy anyway; what is compared or proved keeps every digit.
    """
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before


def load_model(folder: Path, check: Check = lambda: None, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal language model in evaluation mode on this worker's device; safetensors only, no remote code.

    `check`, which may raise to stop what takes long, is called as weights are read, and then before each block runs, or
    runs backwards, and before the head does.
    Raises: BrokenCheckpoint, ImpossibleModel, UnsupportedArchitecture.
    """
    return _stoppable(load_checkpoint(folder, dtype=dtype or compute_dtype(), device=device(), check=check), check)


def load_vision_language(
    folder: Path, check: Check = lambda: None, *, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A vision-language model, whole, as `load_model` loads others. Raises: as that, but for architectures."""
    return load_whole(folder, dtype=dtype or compute_dtype(), device=device(), check=check)


def fits_whole(needed_bytes: int, memory_bytes: int | None) -> bool:
    """Whether weights fit this worker's device, of which it may take `memory_bytes` (None for all)."""
    return needed_bytes <= RESIDENT_SHARE * free_memory_bytes(device(), memory_bytes)


def load_for_walks(
    folder: Path,
    check: Check = lambda: None,
    *,
    dtype: torch.dtype | None = None,
    memory_bytes: int | None = None,
) -> PreTrainedModel:
    """The model for passes over its blocks: on this worker's device, or sharded over all accelerators that it sees, or
    with its blocks read one at a time, whatever is the first that fits.

    Of every device it may take `memory_bytes`, None for all. Stacked experts, which checkpoints keep apart, are never
    read one at a time. Calls `check` as that of `load_model` does.
    Raises: BrokenCheckpoint, ImpossibleModel, UnsupportedArchitecture.
    """
    tensors = check_complete(folder, check)
    dtype = dtype or compute_dtype()
    if fits_whole(parameter_bytes(folder, dtype, check), memory_bytes):
        return load_model(folder, check, dtype=dtype)
    memory = {
        number: int(RESIDENT_SHARE * free_memory_bytes(one, memory_bytes)) for number, one in enumerate(accelerators())
    }
    if len(memory) > 1 and (placed := placement(folder, dtype=dtype, memory=memory, check=check)) is not None:
        return _stoppable(load_placed(folder, placed, dtype=dtype, check=check), check)
    if not tensors.one_to_one:
        return load_model(folder, check, dtype=dtype)
    return load_streamed_model(folder, check, dtype=dtype)[0]


def load_streamed_model(
    folder: Path,
    check: Check = lambda: None,
    *,
    dtype: torch.dtype | None = None,
    cut: Cut = WHOLE,
    room: BlockRoom | None = None,
    alike: Mapping[str, Hashable] | None = None,
    beside: PreTrainedModel | None = None,
) -> tuple[PreTrainedModel, BlockReader]:
    """A model, or what `cut` leaves of it, whose blocks are read when they are called; as `load_streamed`.

    Calls `check` as that of `load_model` does.
    """
    model, reader = load_streamed(
        folder,
        dtype=dtype or compute_dtype(),
        device=device(),
        check=check,
        cut=cut,
        room=room,
        alike=alike,
        beside=beside,
    )
    return _stoppable(model, check), reader


def _stoppable(model: PreTrainedModel, check: Check) -> PreTrainedModel:
    # Functions of their own: models are copied, and copies share functions, but would copy what `check` is bound to.
    def ask(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        check()

    def ask_going_back(block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        h: Tensor = output[0] if isinstance(output, tuple) else output
        if h.requires_grad:
            h.register_hook(lambda gradient: check())

    for block in block_stack(model).blocks:
        block.register_forward_pre_hook(ask)
        block.register_forward_hook(ask_going_back)
    model.get_output_embeddings().register_forward_pre_hook(ask)
    return model


def is_streamed(model: PreTrainedModel) -> bool:
    """Whether the model's blocks come from disk when they are called."""
    return any(parameter.is_meta for parameter in model.parameters())


def can_train(model: PreTrainedModel) -> bool:
    """Whether the model lies whole on one device; gradients are computed on no other."""
    return not is_streamed(model) and len({parameter.device for parameter in model.parameters()}) == 1


def windows_at_once(model: PreTrainedModel, window_tokens: int) -> int:
    """How many calibration windows to walk through the blocks together when every block is tried for removal."""
    return walk_windows(model, window_tokens, streams=model.config.num_hidden_layers + 1)


def walk_windows(model: PreTrainedModel, window_tokens: int, *, streams: int) -> int:
    """How many windows to walk through the blocks together, each with so many hidden states of every token."""
    if device().type == "cuda":
        memory_bytes = _room(model) // 4
    else:
        memory_bytes = STREAMED_WALK_BYTES if is_streamed(model) else RESIDENT_WALK_BYTES
    return windows_in(
        memory_bytes,
        streams=streams,
        tokens=window_tokens,
        hidden=model.config.hidden_size,
        itemsize=model.dtype.itemsize,
    )


def anchor_bytes(model: PreTrainedModel) -> int:
    """What the hidden states may take that an engine holds of the set that a search moves from."""
    return _room(model) // 4 if device().type == "cuda" else ANCHOR_BYTES


def prompt_bytes(model: PreTrainedModel) -> int:
    """What the processed prompts may take that a pair's engine keeps."""
    return _room(model) // 4 if device().type == "cuda" else PROMPT_BYTES


def _room(model: PreTrainedModel) -> int:
    """What the fullest of the model's devices could still hold."""
    return min(map(free_memory_bytes, {p.device for p in model.parameters() if not p.is_meta}))


def give_back_memory() -> None:
    """Let the machine have what models took that nobody holds any more.

    They lie in cycles with what reads their blocks. And what glibc's allocator has free between what is held stays
    resident until it is asked for: after healing block by block that was as much as what is held.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def free_memory_bytes(at: torch.device, limit: int | None = None) -> int:
    """What a device could still hold, where this process may take `limit` bytes of it; None for all that is free."""
    if at.type == "cuda":
        taken = torch.cuda.memory_allocated(at)
        # What PyTorch keeps for itself without need is free, too.
        free = torch.cuda.mem_get_info(at)[0] + torch.cuda.memory_reserved(at) - taken
    else:
        taken = int(psutil.Process().memory_info().rss)
        left = container_memory(CONTAINER)
        available = int(psutil.virtual_memory().available)
        free = available if left is None else min(available, left)
    return free if limit is None else max(0, min(free, limit - taken))


def container_memory(folder: Path) -> int | None:
    """What a container may still take by the files of its control group; None where it has no bound."""
    try:
        bound, taken = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        pages = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # No bound is written as `max`.
        return None
    # What was read of files gives way.
    return max(0, bound - taken + int(pages.get("inactive_file", 0)) + int(pages.get("active_file", 0)))


def embedded_tokens(model: PreTrainedModel) -> int:
    """How many tokens the model has an embedding of."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer; no remote code. Raises: UnreadableSource."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # Of a file that is no tokenizer's, `tokenizers` raises just that.
        raise UnreadableSource(
            f"The model's tokenizer cannot be loaded: {said(error)}", param="model.source"
        ) from error
    return tokenizer
