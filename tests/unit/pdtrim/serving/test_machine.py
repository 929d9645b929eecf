from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from pdtrim.serving.engines import Device
from pdtrim.serving.machine import Command, Machine, commands, ports_from
from tests.served import serving


def planned(device: Device = "cpu", *, gpus: Any = None, **config: Any) -> tuple[Command, Command, Command]:
    machine = Machine("python3", {"prefill": "/p", "decode": "/d"}, ports_from(23000), gpus=gpus, more=("--seed", "1"))
    return commands(serving(device, **config), machine)


def value(command: Command, option: str) -> str:
    """What follows an option, which stands there once."""
    assert command.arguments.count(option) == 1, (option, command.arguments)
    return command.arguments[command.arguments.index(option) + 1]


def test_each_engine_serves_its_half_in_its_role() -> None:
    for command, folder, role in zip(planned(), ("/p", "/d"), ("kv_producer", "kv_consumer"), strict=False):
        assert value(command, "--model") == folder
        transfer = json.loads(value(command, "--kv-transfer-config"))
        assert transfer["kv_role"] == role
        assert transfer["kv_load_failure_policy"] == "fail"
        assert value(command, "--seed") == "1"


def test_both_halves_share_what_the_handshake_compares() -> None:
    prefill, decode, _ = planned()
    for option in ("--dtype", "--block-size", "--max-model-len", "--max-num-seqs", "--served-model-name"):
        assert value(prefill, option) == value(decode, option)


def test_no_two_listen_on_one_port_and_the_router_knows_both_engines() -> None:
    prefill, decode, router = planned()
    ports = ports_from(23000)
    assert len(set(ports.all)) == 6
    assert value(router, "--prefill") == f"http://127.0.0.1:{value(prefill, '--port')}"
    assert value(router, "--decode") == f"http://127.0.0.1:{value(decode, '--port')}"
    sides = [command.variables["VLLM_NIXL_SIDE_CHANNEL_PORT"] for command in (prefill, decode)]
    assert [int(side) for side in sides] == list(ports.side.values())


def test_a_windowed_pair_goes_without_the_hybrid_cache_manager() -> None:
    flag = "--disable-hybrid-kv-cache-manager"
    assert [flag in command.arguments for command in planned()[:2]] == [False, False]
    assert [flag in command.arguments for command in planned(sliding_window=512)[:2]] == [True, True]


@pytest.mark.parametrize(("device", "module"), [("cpu", "first_token"), ("cuda", "first_token_v2")])
def test_decode_alone_gets_the_processor_that_its_model_runner_takes(device: Device, module: str) -> None:
    prefill, decode, _ = planned(device)
    assert value(decode, "--logits-processors") == f"pdtrim_vllm.{module}:FirstToken"
    assert "--logits-processors" not in prefill.arguments


def test_engines_on_one_device_leave_room_for_each_other() -> None:
    apart = planned("cuda", gpus={"prefill": "0", "decode": "1"})
    together = planned("cuda", gpus={"prefill": "0", "decode": "0"})
    assert [command.variables["CUDA_VISIBLE_DEVICES"] for command in apart[:2]] == ["0", "1"]
    assert not any("--gpu-memory-utilization" in command.arguments for command in apart)
    assert [value(command, "--gpu-memory-utilization") for command in together[:2]] == ["0.45", "0.45"]


def test_a_command_can_be_pasted_into_a_shell() -> None:
    for command in planned():
        words = shlex.split(command.shell().replace("\\\n", " "))
        assert words == [*(f"{name}={text}" for name, text in command.variables.items()), *command.arguments]
