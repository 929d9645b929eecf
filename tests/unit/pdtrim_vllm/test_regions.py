"""Which region of prefill's cache a layer of decode reads."""

from __future__ import annotations

import pytest

from pdtrim_vllm.regions import UnmappedRegions, check_regions, layer_of, sources


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


def test_layers_whose_attention_is_given_up_read_nothing() -> None:
    assert sources(names(0, 2), names(0, 1, 2, 3), [0, 1, 3]) == [0, 3]


def test_layers_that_share_a_region_are_refused_with_the_flag_to_set() -> None:
    for regions in (names(0, 1), names(0, 1, 1), names(0, 1, 2, 3)):
        with pytest.raises(UnmappedRegions, match="--disable-hybrid-kv-cache-manager"):
            check_regions(regions, 3, ())


def test_a_layer_whose_attention_is_given_up_may_have_a_region_and_need_not() -> None:
    check_regions(names(0, 2), 3, {1})
    check_regions(names(0, 1, 2), 3, {1})
    with pytest.raises(UnmappedRegions, match="1 KV caches are not one for each of 2 layers"):
        check_regions(names(0), 3, {1})


def test_a_layer_that_has_several_regions_is_refused() -> None:
    with pytest.raises(UnmappedRegions, match="a layer has several"):
        sources(names(0, 1), names(0, 1, 1), [0, 1])


def test_a_layer_that_prefill_does_not_have_is_refused() -> None:
    with pytest.raises(UnmappedRegions, match="that layer 1 of decode goes on from"):
        sources(names(0, 1), names(0, 1, 2), [0, 5])
    with pytest.raises(UnmappedRegions, match="that layer 2 of decode goes on from"):
        sources(names(0, 2), names(0, 1, 2), [0, 1])
