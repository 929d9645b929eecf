"""Which region of prefill's cache a layer of decode reads."""

from __future__ import annotations

import pytest

from pdtrim_vllm.regions import UnmappedRegions, layer_of, sources


def names(*layers: int) -> list[str]:
    return [f"model.layers.{layer}.self_attn.attn" for layer in layers]


def test_a_layer_is_read_from_the_name_of_its_cache() -> None:
    assert layer_of("model.layers.12.self_attn.attn") == 12
    with pytest.raises(UnmappedRegions, match="no single layer number"):
        layer_of("model.layers.1.experts.2.attn")
    with pytest.raises(UnmappedRegions, match="no single layer number"):
        layer_of("model.attn")


def test_each_layer_of_decode_reads_the_region_of_its_layer_in_the_map_whatever_their_order() -> None:
    assert sources(names(0, 1, 2), names(0, 1, 2, 3, 4), [0, 2, 4]) == [0, 2, 4]
    assert sources(names(2, 0, 1), names(4, 3, 2, 1, 0), [0, 2, 4]) == [0, 4, 2]


def test_layers_that_share_a_region_are_refused_with_the_flag_to_set() -> None:
    with pytest.raises(UnmappedRegions, match="--disable-hybrid-kv-cache-manager"):
        sources(names(0, 1), names(0, 1, 2), [0, 1, 2])
    with pytest.raises(UnmappedRegions, match="--disable-hybrid-kv-cache-manager"):
        sources(names(0, 1), names(0, 1, 1), [0, 1])


def test_a_layer_that_prefill_does_not_have_is_named() -> None:
    with pytest.raises(UnmappedRegions, match="layer 5"):
        sources(names(0, 1), names(0, 1, 2), [0, 5])
