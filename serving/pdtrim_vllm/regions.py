"""Which region of prefill's KV cache each layer of decode reads."""

from __future__ import annotations

import re
from collections.abc import Sequence

LAYER_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


class UnmappedRegions(ValueError):
    """Regions that are not one for each layer, so that the map cannot be applied to them."""


def layer_of(region: str) -> int:
    """The layer in a region's name, such as 7 in `model.layers.7.self_attn.attn`. Raises: UnmappedRegions."""
    found = LAYER_NUMBER.findall(region)
    if len(found) != 1:
        raise UnmappedRegions(f"no single layer number in the name {region!r} of a KV cache")
    return int(found[0])


def sources(decode: Sequence[str], prefill: Sequence[str], layer_map: Sequence[int]) -> list[int]:
    """For each region of decode, by name, the number of the region in `prefill` that it reads.

    Raises: UnmappedRegions when either has not exactly one region for each layer.
    """
    place = {layer_of(name): number for number, name in enumerate(prefill)}
    layers = [layer_of(name) for name in decode]
    if len(place) != len(prefill) or sorted(layers) != list(range(len(layer_map))):
        raise UnmappedRegions(
            f"{len(decode)} KV caches in decode and {len(prefill)} in prefill are not one for each layer; layers that "
            "share one come from the hybrid KV cache manager: start both engines with --disable-hybrid-kv-cache-manager"
        )
    if missing := [layer_map[layer] for layer in layers if layer_map[layer] not in place]:
        raise UnmappedRegions(f"prefill has no KV cache of its layer {missing[0]}, which decode goes on from")
    return [place[layer_map[layer]] for layer in layers]
