"""vLLM's plugin: as a model is made, before its weights are read, it loses what its pdtrim.json says is given up.

Found by vLLM as an entry point of `vllm.general_plugins`. What cannot be skipped is computed as stock vLLM does, with
the zeros that are in the checkpoint, and a line in the log says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import wraps
from typing import Any

import vllm
from torch import nn
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.logger import init_logger

from pdtrim_vllm.half import Half, NotAHalf
from pdtrim_vllm.startup import SERIES

logger = init_logger("vllm.pdtrim")
CONNECTOR = "PDTrimConnector"


def register() -> None:
    """Have all models pass through `skip_dead`; called once in each process of vLLM."""
    if not any(vllm.__version__.startswith(f"{series}.") for series in SERIES):
        logger.warning("PDTrim skips nothing: it is made for vLLM %s, not %s", ", ".join(SERIES), vllm.__version__)
        return
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    stock = BaseModelLoader.create_model

    @wraps(stock)
    def create_model(self: Any, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        model: nn.Module = stock(self, vllm_config, model_config, prefix)
        skip_dead(model, vllm_config, model_config)
        return model

    BaseModelLoader.create_model = create_model


def skip_dead(model: nn.Module, config: VllmConfig, model_config: ModelConfig) -> None:
    """Take out of a model without weights what its pdtrim.json says is given up, and log what that saves."""
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    from pdtrim_vllm.checkpoint import read_json
    from pdtrim_vllm.keys_values import cut_graphs
    from pdtrim_vllm.layers import skipping

    if not (content := read_json(model_config)) or not content.get("dead_units"):
        return
    try:
        half = Half.from_json(content)
    except NotAHalf as error:
        logger.warning("PDTrim skips nothing of pdtrim.json: %s", error)
        return
    if reasons := list(problems(model, half, config)):
        logger.warning("PDTrim skips nothing, all is computed as stock vLLM does: %s", "; ".join(reasons))
        return
    before = parameter_bytes(model)
    layers = decoder_layers(model)[0]
    for name in needless_caches(layers, half, config):
        del config.compilation_config.static_forward_context[name]
    with set_current_vllm_config(config):
        for layer, part in half.dead:
            # Other stages of the pipeline have the rest.
            if hasattr(layers[layer], "self_attn"):
                layers[layer] = skipping(layers[layer], part)
    record_metadata_for_reloading(model)
    cut_graphs(config.compilation_config)
    # vLLM keeps compiled models by its configuration, which has to differ where what is skipped does.
    config.additional_config = {**config.additional_config, "pdtrim": [list(dead) for dead in half.dead]}
    logger.info(
        "PDTrim skips %s: %d of %d bytes of weights are held",
        ", ".join(f"{part} of layer {layer}" for layer, part in half.dead),
        parameter_bytes(model),
        before,
    )


def problems(model: nn.Module, half: Half, config: VllmConfig) -> Iterator[str]:
    """What stands against skipping."""
    from pdtrim_vllm.layers import class_name

    found = decoder_layers(model)
    if len(found) != 1:
        classes = {class_name(layer) for layer in model.modules() if hasattr(layer, "self_attn")}
        yield f"its layers are {', '.join(sorted(classes)) or f'not found in {class_name(model)}'}"
        return
    if len(found[0]) != len(half.kept_blocks):
        yield f"the model has {len(found[0])} layers, and its pdtrim.json names {len(half.kept_blocks)} blocks"
        return
    if config.quant_config is not None:
        yield "weights are quantized"
    if config.lora_config is not None:
        yield "LoRA is on"
    if not isinstance(config.additional_config, dict):
        yield "additional_config is not a dictionary"
    dead: list[tuple[Any, str]] = [(found[0][layer], part) for layer, part in half.dead]
    if any(getattr(layer, "ada_rms_norm_t_cond", None) is not None for layer, _ in dead):
        yield "its norms depend on a time"
    attentions = [layer.self_attn.attn for layer, part in dead if part == "kv_only" and hasattr(layer, "self_attn")]
    if any(attention.attn_backend.forward_includes_kv_cache_update for attention in attentions):
        yield "this attention cannot write a KV cache by itself"


def decoder_layers(model: nn.Module) -> list[nn.ModuleList]:
    """Lists of layers that are all of known classes, or on another stage of the pipeline."""
    from vllm.model_executor.models.utils import PPMissingLayer

    from pdtrim_vllm.layers import KNOWN, class_name

    return [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and all(isinstance(layer, PPMissingLayer) or class_name(layer) in KNOWN for layer in module)
        and any(class_name(layer) in KNOWN for layer in module)
    ]


def needless_caches(layers: nn.ModuleList, half: Half, config: VllmConfig) -> list[str]:
    """Names of the KV caches that are left out: those of dead attentions, all or none.

    Stock connectors want as many caches in decode as there are in prefill. And where no layer without a window were
    left, vLLM would let go of tokens that are out of sight, and manage blocks otherwise than the other half does.
    """
    transfer = config.kv_transfer_config
    if transfer is not None and transfer.kv_connector != CONNECTOR:
        return []
    here: dict[int, Any] = {number: layer for number, layer in enumerate(layers) if hasattr(layer, "self_attn")}
    attentions = {number: layer.self_attn.attn for number, layer in here.items()}
    alive = [attention for number, attention in attentions.items() if number not in half.without_attention]
    if {one.sliding_window for one in alive} != {one.sliding_window for one in attentions.values()}:
        return []
    return [attention.layer_name for number, attention in attentions.items() if number in half.without_attention]


def parameter_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
