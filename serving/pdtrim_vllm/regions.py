"""Which region of prefill's KV cache each layer of decode reads."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

LAYER_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


HYBRID = (
    "layers that share one come from the hybrid KV cache manager: start both engines with "
    "--disable-hybrid-kv-cache-manager"
)


class UnmappedRegions(ValueError):
    """Regions that are not one for each layer, so that the map cannot be applied to them."""


def layer_of(region: str) -> int:
    """The layer in a region's name, such as 7 in `model.layers.7.self_attn.attn`. Raises: UnmappedRegions."""
    found = LAYER_NUMBER.findall(region)
    if len(found) != 1:
        raise UnmappedRegions(f"no single layer number in the name {region!r} of a KV cache")
    return int(found[0])


def check_regions(regions: Sequence[str], layers: int, without_attention: Collection[int]) -> None:
    """Each of `layers` has a region of its own, but for those `without_attention`, which need none.

    Raises: UnmappedRegions.
    """
    found = [layer_of(name) for name in regions]
    needed = set(range(layers)).difference(without_attention)
    if len(set(found)) < len(found) or not needed <= set(found) <= set(range(layers)):
        raise UnmappedRegions(f"{len(regions)} KV caches are not one for each of {len(needed)} layers; {HYBRID}")


def sources(decode: Sequence[str], prefill: Sequence[str], layer_map: Sequence[int]) -> list[int]:
    """For each region of decode, by name, the number of the region in `prefill` that it reads.

    Raises: UnmappedRegions when a layer has several regions, or decode one that prefill has not.
    """
    place = {layer_of(name): number for number, name in enumerate(prefill)}
    layers = [layer_of(name) for name in decode]
    if len(place) < len(prefill) or len(set(layers)) < len(layers):
        raise UnmappedRegions(f"{len(decode)} KV caches in decode, {len(prefill)} in prefill: a layer has several")
    if missing := [layer for layer in layers if layer >= len(layer_map) or layer_map[layer] not in place]:
        raise UnmappedRegions(f"prefill has no KV cache that layer {missing[0]} of decode goes on from; {HYBRID}")
    return [place[layer_map[layer]] for layer in layers]
