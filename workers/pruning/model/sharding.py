"""A model larger than any one accelerator of this machine: its blocks lie whole on several, as accelerate places them.

Accelerate's hooks bring what a module is called with to the module's device, so a walk calls the blocks as it does
elsewhere; what blocks of two devices gave meets only where it is moved first. Tests run this on devices that compute
on the CPU and refuse to mix; it has not been run on several real GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate import infer_auto_device_map
from transformers import AutoModelForCausalLM, PreTrainedModel

from workers.pruning.model.blocks import block_stack
from workers.pruning.model.building import building
from workers.pruning.model.checkpoint import count_tensors, empty_model
from workers.pruning.model.configuration import read_config

Placement = Mapping[str, int | str | torch.device]
"""Name of a module → the device of everything in it."""


def placement(
    folder: Path, *, dtype: torch.dtype, memory: Mapping[int, int], check: Callable[[], None] = lambda: None
) -> Placement | None:
    """Where the modules of a checkpoint's model go, no block split, given the bytes that each accelerator may take.

    The first one keeps room for the largest part besides, as accelerate has it. None when the weights do not fit.
    Calls `check` as `empty_model` does. Raises: UnsupportedArchitecture, ImpossibleModel.
    """
    model = empty_model(folder, check)
    whole = sorted({type(block).__name__ for block in block_stack(model).blocks})
    placed: Placement = infer_auto_device_map(
        model, max_memory=dict(memory), no_split_module_classes=whole, dtype=dtype
    )
    return None if "disk" in placed.values() else placed


def load_placed(
    folder: Path, placed: Placement, *, dtype: torch.dtype, check: Callable[[], None] = lambda: None
) -> PreTrainedModel:
    """A causal language model in evaluation mode with every module where `placed` says; for walks, not for training.

    Before every part and every tensor `check` is called, which may raise.
    """
    with building(check, tensors=count_tensors(folder)):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder,
            config=read_config(folder),
            dtype=dtype,
            device_map=dict(placed),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    model.eval().requires_grad_(False)
    return model
