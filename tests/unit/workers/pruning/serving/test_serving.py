from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from tests.unit.workers.pruning.models import (
    FAMILIES,
    OTHERS,
    REFERENCE,
    continued,
    continued_by_pair,
    random_ids,
    reference_windows,
    tiny_model,
)
from workers.pruning.model.blocks import drop_blocks
from workers.pruning.model.cache import cache_bytes
from workers.pruning.model.checkpoint import SourceTensors, write_checkpoint
from workers.pruning.model.pair import FirstToken
from workers.pruning.model.plan import BlockPlan, kv_layer_map
from workers.pruning.serving.handover import (
    EVERY_TOKEN,
    LENGTH_BYTES,
    METADATA,
    BrokenHandover,
    Handover,
    KvTokenRule,
    receive,
    send,
)
from workers.pruning.serving.pair_server import DecodeHalf, PrefillDecodePair, PrefillHalf

LAYER_MAP = (0, 1, 3, 4)
HALVES: tuple[FirstToken, ...] = ("decode", "prefill")
NEW_TOKENS = 8


def tiny_pair(
    family: str = "llama", rule: KvTokenRule = EVERY_TOKEN, first_token: FirstToken = "prefill"
) -> PrefillDecodePair:
    """A dense model of five blocks, and the same without block 2."""
    model = tiny_model(family)
    return PrefillDecodePair(
        PrefillHalf(model, LAYER_MAP, rule, first_token), DecodeHalf(drop_blocks(model, {2}), LAYER_MAP)
    )


def export(folder: Path, removed: dict[str, set[int]], **pdtrim: object) -> None:
    """The reference model's prefill and decode checkpoints as two folders of `folder`."""
    plans = {role: BlockPlan(12, frozenset(blocks)) for role, blocks in removed.items()}
    layer_map = kv_layer_map(plans["prefill"], plans["decode"])
    folder.mkdir(exist_ok=True)
    save_file({}, folder / "untrained.safetensors")
    for role, plan in plans.items():
        write_checkpoint(
            REFERENCE,
            folder / role,
            kept=plan.kept,
            overrides=SourceTensors.in_file(folder / "untrained.safetensors"),
            pdtrim={"kv_layer_map": layer_map, **pdtrim},
            model_card="",
        )


@pytest.mark.parametrize("first_token", HALVES)
@pytest.mark.parametrize("family", FAMILIES + OTHERS)
def test_a_pair_continues_as_plain_transformers_caches_do(family: str, first_token: FirstToken) -> None:
    pair, ids = tiny_pair(family, first_token=first_token), random_ids(2, 12)
    halves = pair.prefill_half.model, pair.decode_half.model
    expected = continued_by_pair(*halves, LAYER_MAP, ids, new_tokens=12, first_token=first_token)
    assert torch.equal(pair.decode(pair.prefill(ids), 12), expected)


def test_the_halves_may_differ_on_the_first_token() -> None:
    ids = random_ids(16, 12)
    by_decode, by_prefill = (
        pair.decode(pair.prefill(ids), 1) for pair in (tiny_pair(first_token=half) for half in HALVES)
    )
    assert torch.equal(by_prefill, tiny_model("llama")(input_ids=ids).logits[:, -1:].argmax(-1))
    assert not torch.equal(by_decode, by_prefill)


@pytest.mark.parametrize("rule", [EVERY_TOKEN, KvTokenRule(2, 3, frozenset({0, 2}))])
@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
def test_of_a_prompt_of_one_token_decode_is_handed_nothing(family: str, rule: KvTokenRule) -> None:
    pair, ids = tiny_pair(family, rule, "decode"), random_ids(2, 1)
    sent = Handover.from_bytes(pair.prefill(ids).to_bytes())
    assert (sent.handed_tokens, sent.nbytes) == (0, 0)
    # Nothing of prefill is left: the answer is the decode model's own.
    expected = continued(pair.decode_half.model, ids, 8)[:, 1:]
    assert torch.equal(pair.decode(sent, 8), expected)


@pytest.mark.parametrize("first_token", HALVES)
@pytest.mark.parametrize("family", FAMILIES + OTHERS)
def test_a_handover_survives_its_bytes(family: str, first_token: FirstToken) -> None:
    pair = tiny_pair(family, KvTokenRule(2, 3, frozenset({0, 2})), first_token)
    sent = pair.prefill(random_ids(2, 12))
    frame = sent.to_bytes()
    came = Handover.from_bytes(frame)
    assert (came.handed_tokens, came.next_tokens) == (sent.handed_tokens, sent.next_tokens)
    assert came.first_token == first_token
    for one, other in zip(came.layers, sent.layers, strict=True):
        assert (one.source, one.ranges) == (other.source, other.ranges)
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
    assert payload_bytes(frame) == sent.nbytes == came.nbytes


def test_layers_with_a_sliding_window_send_what_the_window_can_still_reach() -> None:
    handover = tiny_pair("qwen2-mixed").prefill(random_ids(1, 12))  # a window of 6 on blocks 0, 2 and 4
    assert [layer.ranges for layer in handover.layers] == [((7, 12),), ((0, 12),), ((0, 12),), ((7, 12),)]


def test_tokens_that_a_sliding_window_cannot_reach_are_ignored() -> None:
    model, ids = tiny_model("mistral-sliding"), random_ids(1, 12)  # a window of 7
    half = DecodeHalf(model, (0, 1, 2, 3, 4))
    sent = PrefillHalf(model, (0, 1, 2, 3, 4), first_token="prefill").prefill(ids)
    noise = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    older = tuple(
        dataclasses.replace(
            layer,
            ranges=((1, 5), (6, 12)),
            keys=torch.cat([noise, layer.keys], dim=-2),
            values=torch.cat([noise, layer.values], dim=-2),
        )
        for layer in sent.layers
    )
    assert torch.equal(half.decode(dataclasses.replace(sent, layers=older), 8), half.decode(sent, 8))


def test_the_full_handover_of_a_model_without_windows_has_the_size_of_its_cache() -> None:
    pair = tiny_pair("qwen3")
    expected = cache_bytes(pair.decode_half.model, 12, torch.float32)
    assert pair.prefill(random_ids(1, 12)).nbytes == expected
    assert pair.prefill(random_ids(3, 12)).nbytes == 3 * expected


def test_bfloat16_survives_the_wire() -> None:
    model = tiny_model("llama").bfloat16()
    sent = PrefillHalf(model, (0, 1, 2, 3, 4)).prefill(random_ids(1, 9))
    came = Handover.from_bytes(sent.to_bytes())
    assert came.layers[3].keys.dtype == torch.bfloat16
    assert torch.equal(came.layers[3].keys, sent.layers[3].keys)
    with pytest.raises(BrokenHandover, match=r"in torch\.bfloat16; this decode model has 2 KV heads of 8"):
        DecodeHalf(tiny_model("llama"), (0, 1, 2, 3, 4)).decode(came, 2)


@pytest.mark.parametrize("first_token", HALVES)
def test_decoding_ends_once_every_sequence_has_stopped(first_token: FirstToken) -> None:
    pair, ids = tiny_pair(first_token=first_token), random_ids(2, 12)
    assert pair.decode(pair.prefill(ids), 10, stop=range(97)).shape == (2, 1)
    whole = pair.decode(pair.prefill(ids), 10)
    ends = {int(whole[0, 2]), int(whole[1, 5])}
    ended = [min(step for step, token in enumerate(row) if token in ends) for row in whole.tolist()]
    assert torch.equal(pair.decode(pair.prefill(ids), 10, stop=ends), whole[:, : max(ended) + 1])


# The prefill process: serves one connection, for each prompt a frame; prints what it reports to have sent.
PREFILL_PROCESS = """
import json, socket, sys, torch
from pathlib import Path
from workers.pruning.serving.handover import send
from workers.pruning.serving.pair_server import PrefillHalf

prompts = json.loads(Path(sys.argv[2]).read_text())
half = PrefillHalf.load(Path(sys.argv[1]), dtype=torch.float32)
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    connection, _ = server.accept()
with connection:
    for prompt in prompts:
        handover = half.prefill(torch.tensor([prompt]))
        send(connection, handover.to_bytes())
        print(handover.nbytes, flush=True)
"""


def payload_bytes(frame: bytes) -> int:
    """The bytes of a safetensors file after its header."""
    return len(frame) - LENGTH_BYTES - int.from_bytes(frame[:LENGTH_BYTES], "little")


@pytest.mark.process
def test_two_processes_over_a_socket_give_the_tokens_of_one(tmp_path: Path) -> None:
    export(
        tmp_path,
        {"prefill": {2, 5}, "decode": {2, 4, 5, 9}},
        kv_tokens={"first": 8, "last": 16, "layers": [1, 4]},
        serving={"first_token": "decode"},
    )
    windows = reference_windows("validation", 20, 128)
    prompts = [window[: 5 + 6 * number].tolist() for number, window in enumerate(windows)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))

    prefill = subprocess.Popen(
        [sys.executable, "-c", PREFILL_PROCESS, str(tmp_path / "prefill"), str(tmp_path / "prompts.json")],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        pair = PrefillDecodePair.load(tmp_path / "prefill", tmp_path / "decode", dtype=torch.float32)
        here = [pair.decode(pair.prefill(torch.tensor([prompt])), NEW_TOKENS) for prompt in prompts]
        assert prefill.stdout is not None
        port = int(prefill.stdout.readline())
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            frames = [receive(connection, max_bytes=1 << 20) for _ in prompts]
        reported = [int(line) for line in prefill.stdout]
        assert prefill.wait(60) == 0
    finally:
        prefill.kill()
        prefill.wait()

    assert [payload_bytes(frame) for frame in frames] == reported
    for frame, expected in zip(frames, here, strict=True):
        assert torch.equal(pair.decode_half.decode(Handover.from_bytes(frame), NEW_TOKENS), expected)


@pytest.mark.parametrize(
    ("recorded", "first_token"),
    [({}, "prefill"), ({"serving": {"first_token": "decode"}}, "decode")],
    ids=["earlier", "decode"],
)
def test_checkpoints_are_served_as_they_say_and_send_every_token_unless_told(
    tmp_path: Path, recorded: dict[str, Any], first_token: FirstToken
) -> None:
    export(tmp_path, {"prefill": {2, 5}, "decode": {2, 4, 5, 9}}, **recorded)
    pair = PrefillDecodePair.load(tmp_path / "prefill", tmp_path / "decode", dtype=torch.float32)
    ids = reference_windows("validation", 2, 48)
    prefill, decode = pair.prefill_half, pair.decode_half
    expected = continued_by_pair(
        prefill.model, decode.model, prefill.layer_map, ids, new_tokens=NEW_TOKENS, first_token=first_token
    )
    assert pair.prefill_half.layer_map == (0, 1, 2, 4, 5, 6, 8, 9)
    assert torch.equal(pair.decode(pair.prefill(ids), NEW_TOKENS), expected)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        other.settimeout(10)
        yield one, other


def test_frames_larger_than_a_socket_buffer_arrive_whole(ends: tuple[socket.socket, socket.socket]) -> None:
    frame = os.urandom(3_000_000)
    sender = threading.Thread(target=send, args=(ends[0], frame))
    sender.start()
    assert receive(ends[1], max_bytes=3_000_000) == frame
    sender.join()


def test_a_frame_announced_as_too_long_is_refused_unread(ends: tuple[socket.socket, socket.socket]) -> None:
    send(ends[0], b"x" * 101)
    with pytest.raises(BrokenHandover, match="announces a frame of 101 bytes; at most 100 are accepted"):
        receive(ends[1], max_bytes=100)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"\0\0\0", "closed after 3 of 8 bytes of the length of a frame"),
        ((5).to_bytes(8, "big") + b"ab", "closed after 2 of 5 bytes of a frame"),
    ],
)
def test_a_connection_that_closes_early_is_named(
    ends: tuple[socket.socket, socket.socket], sent: bytes, reason: str
) -> None:
    ends[0].sendall(sent)
    ends[0].close()
    with pytest.raises(BrokenHandover, match=reason):
        receive(ends[1], max_bytes=100)


def described(tensors: dict[str, Tensor], **changes: object) -> bytes:
    """A safetensors file with the metadata of a handover of one layer, some of it changed."""
    content = {
        "format_version": 2,
        "handed_tokens": 6,
        "next_tokens": [3],
        "first_token": "decode",
        "layers": [{"source": 0, "ranges": [[0, 2], [4, 6]]}],
    }
    return save(tensors, {METADATA: json.dumps(content | changes)})


GOOD = {"0.keys": torch.zeros(1, 2, 4, 8), "0.values": torch.zeros(1, 2, 4, 8)}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes are no whole safetensors file"),
        (described(GOOD)[:-1], "no whole safetensors file"),
        (described(GOOD) + b"x", "no whole safetensors file"),
        (save(GOOD), "describes no handover: KeyError"),
        (save(GOOD, {METADATA: "[" * 100_000}), "describes no handover: RecursionError"),
        (described(GOOD, format_version=1), "format version 1; this is for 2"),
        (described(GOOD, layers=[{"source": 0, "ranges": [[0]]}]), "describes no handover: ValueError"),
        (described({"0.keys": GOOD["0.keys"]}), "describes no handover: KeyError"),
        (described({**GOOD, "1.keys": torch.zeros(1)}), "3 tensors came for 1 layers"),
        (described(GOOD, layers=[{"source": 0, "ranges": [[0, 3], [2, 3]]}]), "do not fit 6 prompt tokens"),
        (described(GOOD, layers=[{"source": 0, "ranges": [[2, 2], [2, 6]]}]), "do not fit 6 prompt tokens"),
        (described(GOOD, layers=[{"source": 0, "ranges": [[-2, 2]]}]), "do not fit 6 prompt tokens"),
        (described(GOOD, handed_tokens=5), "do not fit 5 prompt tokens"),
        (described(GOOD, layers=[{"source": 0, "ranges": [[0, 3]]}]), "do not hold 3 tokens of 1 sequences"),
        (described(GOOD, first_token="router"), "said by decode or prefill, not by 'router'"),
        (described(GOOD, next_tokens=[3, 4]), "do not hold 4 tokens of 2 sequences"),
        (described({**GOOD, "0.values": torch.zeros(1, 3, 4, 8)}), r"values \(1, 3, 4, 8\)"),
    ],
)
def test_what_is_no_handover_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BrokenHandover, match=reason):
        Handover.from_bytes(data)


def test_a_handover_for_another_pair_is_refused() -> None:
    pair = tiny_pair()
    handover = pair.prefill(random_ids(1, 6))
    other = dataclasses.replace(pair.decode_half, layer_map=(0, 1, 2, 4))
    with pytest.raises(BrokenHandover, match=r"holds prefill layers \[0, 1, 3, 4\]; this decode model reads \[0, 1, 2"):
        other.decode(handover, 2)
    with pytest.raises(BrokenHandover, match="the next token 97 is not in a vocabulary of 97"):
        pair.decode(dataclasses.replace(handover, next_tokens=(97,)), 2)


def test_halves_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"\[0, 5\] does not fit a prefill model of 5 layers"):
        PrefillHalf(model, (0, 5))
    with pytest.raises(ValueError, match=r"\[0, 0\] does not fit a prefill model"):
        PrefillHalf(model, (0, 0))
    with pytest.raises(ValueError, match="names decode layer 2 of 2"):
        PrefillHalf(model, (0, 1), KvTokenRule(1, 1, frozenset({2})))
    with pytest.raises(ValueError, match=r"\[0, 1\] does not fit a decode model of 5 layers"):
        DecodeHalf(model, (0, 1))
    with pytest.raises(ValueError, match="take both from one export"):
        PrefillDecodePair(PrefillHalf(model, LAYER_MAP), DecodeHalf(model, (0, 1, 2, 3, 4)))
    with pytest.raises(ValueError, match=r"has no pdtrim\.json"):
        PrefillHalf.load(tmp_path)
    (tmp_path / "pdtrim.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no kv_layer_map"):
        DecodeHalf.load(tmp_path)


def test_attention_without_masks_is_refused() -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' attention takes no mask"):
        DecodeHalf(model, (0, 1, 2, 3, 4))


def test_a_rule_that_leaves_a_layer_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="the first 0 and last 0 prompt tokens are no tokens to send"):
        KvTokenRule(0, 0, frozenset({1}))


def test_a_rule_survives_its_json() -> None:
    rule = KvTokenRule(4, 12, frozenset({5, 1}))
    assert KvTokenRule.from_json(json.loads(json.dumps(rule.to_json()))) == rule
