"""Figures from one walk over blocks that are read from disk, held against those of whole models in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tests.unit.workers.pruning.models import FAMILIES, OTHERS, random_ids, tiny_model
from workers.pruning.model.blocks import block_stack
from workers.pruning.model.cache import cache_bytes
from workers.pruning.model.checkpoint import SourceTensors, load_checkpoint, write_checkpoint
from workers.pruning.model.comparison import Asked, Compared, Comparison, Course, Pair, compare
from workers.pruning.model.measure import perplexity, quality
from workers.pruning.model.pair import FirstToken, first_token_losses, pd_loss
from workers.pruning.model.parts import pruned, zeroed_tensors
from workers.pruning.model.plan import BlockPlan, kv_layer_map
from workers.pruning.model.streaming import BlockReader, BlockRoom, Cut, load_streamed
from workers.pruning.model.width import Channels, narrow

CPU = torch.device("cpu")
WINDOWS, PROMPT = random_ids(5, 16), 8
COPYING = torch.cat([WINDOWS[:, :PROMPT], WINDOWS[:, :PROMPT]], dim=1)
PREFILL = BlockPlan(5, frozenset({2}))
DECODE = BlockPlan(5, frozenset({2}), {4: 3})
TRAINED = 3
"""The block that both halves have otherwise than the dense model."""


@dataclass
class Made:
    """A dense model's folder, and those of its two halves."""

    dense: Path
    prefill: Path
    decode: Path
    overrides: SourceTensors
    plans: tuple[BlockPlan, BlockPlan]
    channels: Channels | None


def made(
    folder: Path,
    family: str,
    plans: tuple[BlockPlan, BlockPlan] = (PREFILL, DECODE),
    channels: Channels | None = None,
) -> Made:
    dense = folder / "dense"
    model = tiny_model(family)
    model.save_pretrained(dense, max_shard_size="20KB")
    narrowed = model if channels is None else narrow(model, channels)
    prefix = f"{block_stack(model).prefix}{TRAINED}."
    trained = {n: (1.1 * p).contiguous() for n, p in narrowed.named_parameters() if n.startswith(prefix)}
    save_file(trained, folder / "trained.safetensors")
    overrides = SourceTensors.in_file(folder / "trained.safetensors")
    for name, plan in zip(("prefill", "decode"), plans, strict=True):
        silent = zeroed_tensors(block_stack(model), plan.parts)
        write_checkpoint(
            dense,
            folder / name,
            kept=plan.kept,
            overrides=overrides,
            pdtrim={},
            model_card="",
            zeroed=silent,
            kept_channels=channels,
        )
    return Made(dense, folder / "prefill", folder / "decode", overrides, plans, channels)


def streamed(
    job: Made, first_token: FirstToken, windows_at_once: int, said: list[float] | None = None
) -> tuple[Comparison, BlockRoom, list[BlockReader]]:
    room = BlockRoom(torch.float32, CPU)
    dense, reader = load_streamed(job.dense, dtype=torch.float32, device=CPU, room=room)
    readers = [reader]
    narrowed = dense
    if job.channels is not None:
        cut = Cut(channels=job.channels)
        narrowed, again = load_streamed(job.dense, dtype=torch.float32, device=CPU, room=room, cut=cut, beside=dense)
        readers.append(again)
    halves, blocks = [], block_stack(tiny_model_like(job))
    for folder, plan in zip((job.prefill, job.decode), job.plans, strict=True):
        changed = set(job.overrides.files) | zeroed_tensors(blocks, plan.parts)
        alike = reader.alike(plan.kept, changed) if job.channels is None else {}
        model, own = load_streamed(folder, dtype=torch.float32, device=CPU, room=room, alike=alike, beside=dense)
        readers.append(own)
        halves.append(Course.of_checkpoint(model, plan))
    before = [Course.of_dense(narrowed, plan) for plan in job.plans]
    whole = Course.of_dense(dense, BlockPlan(5))
    found = compare(
        Compared(
            whole,
            {"prefill": halves[0], "decode": halves[1]},
            {"prefill": before[0], "decode": before[1]},
            {"dense": Pair(whole, whole), "pruned": Pair(*before), "distilled": Pair(*halves)},
            {"dense": whole, "decode": halves[1]},
        ),
        WINDOWS,
        COPYING,
        Asked(PROMPT, first_token, (16, 7), torch.bfloat16, batch=2, windows_at_once=windows_at_once),
        say=([] if said is None else said).append,
    )
    return found, room, readers


def tiny_model_like(job: Made) -> PreTrainedModel:
    return load_checkpoint(job.dense, dtype=torch.float32, device=CPU)


def assert_as_resident(job: Made, found: Comparison, first_token: FirstToken) -> None:
    dense, *halves = (
        load_checkpoint(folder, dtype=torch.float32, device=CPU) for folder in (job.dense, job.prefill, job.decode)
    )
    narrowed = dense if job.channels is None else narrow(dense, job.channels)
    before = [pruned(narrowed, plan) for plan in job.plans]
    for name, model in {"dense": dense, "prefill": halves[0], "decode": halves[1]}.items():
        expected, mine = quality(model, dense, WINDOWS, batch=2), found.models[name]
        assert mine.perplexity.value == pytest.approx(expected.perplexity.value, rel=1e-5)
        assert mine.perplexity.standard_error == pytest.approx(expected.perplexity.standard_error, rel=1e-4)
        assert mine.kl_to_dense == pytest.approx(expected.kl_to_dense, rel=1e-5, abs=1e-6)
        assert mine.top1_agreement == pytest.approx(expected.top1_agreement, abs=1e-6)
    for name, model in zip(("prefill", "decode"), before, strict=True):
        expected_perplexity = perplexity(model, WINDOWS, batch=2)
        assert found.undistilled[name].value == pytest.approx(expected_perplexity.value, rel=1e-5)
    maps = {"dense": list(range(5)), "pruned": kv_layer_map(*job.plans), "distilled": kv_layer_map(*job.plans)}
    pairs = {"dense": (dense, dense), "pruned": before, "distilled": halves}
    for name, (prefill, decode) in pairs.items():
        for kind, windows in (("loss", WINDOWS), ("copying", COPYING)):
            loss = pd_loss(prefill, decode, maps[name], windows, prompt_tokens=PROMPT, first_token=first_token, batch=2)
            assert getattr(found.pairs[name], kind) == pytest.approx(loss, rel=1e-5)
        first = first_token_losses(prefill, decode, maps[name], WINDOWS, prompt_tokens=PROMPT, batch=2)
        assert found.pairs[name].first_token == pytest.approx(first, rel=1e-5)
    for name, model in {"dense": dense, "decode": halves[1]}.items():
        assert found.cached[name] == [cache_bytes(model, n, torch.bfloat16) for n in (16, 7)]


@pytest.mark.training
@pytest.mark.parametrize(
    ("family", "first_token"),
    [*((family, "decode") for family in FAMILIES + OTHERS), ("llama", "prefill"), ("qwen2-mixed", "prefill")],
)
def test_one_walk_over_streamed_blocks_finds_what_whole_models_give(
    family: str, first_token: FirstToken, tmp_path: Path
) -> None:
    job = made(tmp_path, family)
    found, _, _ = streamed(job, first_token, windows_at_once=5)
    assert_as_resident(job, found, first_token)


@pytest.mark.parametrize("windows_at_once", [1, 2])
def test_windows_that_do_not_fit_together_are_walked_one_group_after_another(
    windows_at_once: int, tmp_path: Path
) -> None:
    job = made(tmp_path, "llama")
    found, _, _ = streamed(job, "prefill", windows_at_once)
    assert_as_resident(job, found, "prefill")


def test_halves_with_parts_given_up_and_fewer_channels_are_compared_as_they_are(tmp_path: Path) -> None:
    channels = {block: tuple(range(block, 48, 2)) for block in (0, 1)} | {b: tuple(range(24)) for b in (2, 3, 4)}
    channels[1] = tuple(range(1, 48, 2))
    plans = (BlockPlan(5, frozenset({2}), {}, {1: "kv_only"}), BlockPlan(5, frozenset({2}), {}, {4: "mlp"}))
    job = made(tmp_path, "llama", plans, channels)
    found, _, _ = streamed(job, "decode", windows_at_once=5)
    assert_as_resident(job, found, "decode")


def test_what_two_models_have_alike_is_read_once(tmp_path: Path) -> None:
    job = made(tmp_path, "llama")
    _, room, (dense, prefill, decode) = streamed(job, "prefill", windows_at_once=5)
    # Of both checkpoints the trained block alone, and one block whose class was seen before any walk.
    assert room.blocks_read <= 5 + 2 + 1
    assert (prefill.blocks_read, decode.blocks_read) == (1, 1)
    assert dense.blocks_read <= 6


@pytest.mark.parametrize("windows_at_once", [2, 50])
def test_progress_goes_up_to_the_end_and_not_beyond(windows_at_once: int, tmp_path: Path) -> None:
    said: list[float] = []
    streamed(made(tmp_path, "llama"), "decode", windows_at_once, said)
    assert said == sorted(said)
    assert said[0] == 0
    assert 0.8 <= said[-1] < 1
