"""Parts on a model of random bfloat16 weights that has the shape of Llama-3.1-8B."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.device.bench import GIGABYTE, Bench
from benchmarks.device.findings import Findings, Spread
from benchmarks.device.walks import Losses, largest_difference, plain_losses, pruned
from workers.pruning.model.blocks import block_stack, drop_blocks
from workers.pruning.model.cache import cache_bytes
from workers.pruning.model.measure import parameters, speeds
from workers.pruning.model.pair import handover
from workers.pruning.model.plan import BlockPlan, Blocks, kv_layer_map
from workers.pruning.model.units import deleting
from workers.pruning.search.engine import WholeEngine

BATCHES = (1, 16)
"""Prompts that are answered together."""
ROUNDS = 3
"""Rounds of single removals that are timed."""


def described(model: PreTrainedModel) -> str:
    """A model's depth and size."""
    weights = parameters(model)
    size = f"{weights / 1e9:.2f} billion weights, {weights * model.dtype.itemsize / GIGABYTE:.1f} GB"
    return f"{model.config.num_hidden_layers} blocks, {size} in {str(model.dtype).removeprefix('torch.')}"


def random_tokens(bench: Bench, count: int) -> Tensor:
    """Prompts (count, time) on the device."""
    shape = (count, bench.size.prompt_tokens)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(bench.size.shape.vocab_size, shape, generator=generator).to(bench.device)


def one_round(bench: Bench) -> Findings:
    """The losses of all single removals: the engine's shared walk beside a plain loop of one forward a candidate."""
    model, windows = bench.shaped, random_tokens(bench, bench.size.shape_windows)
    blocks = len(block_stack(model).blocks)
    candidates = [deleting({block}) for block in range(blocks)]
    engine = WholeEngine(block_stack(model), windows, "cross_entropy", chunk_windows=len(windows))
    models = pruned(model, candidates)
    ways: dict[str, Callable[[], Losses]] = {
        "plain loop": lambda: plain_losses(models, windows),
        "engine": lambda: engine.losses(candidates),
    }
    found: dict[str, Losses] = {}
    peaks: dict[str, float | None] = {}
    for name, run in ways.items():  # It also warms up.
        found[name], peaks[name] = with_peak(run, bench.device)
    forwards = {"plain loop": blocks * (blocks - 1), "engine": engine.block_forwards}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            start = bench.now()
            run()
            times[name].append(bench.now() - start)

    findings = Findings()
    table = findings.table(
        f"{described(model)}. Losses of all single removals on {len(windows)} windows of {windows.shape[1]} tokens, "
        f"median (lowest–highest) of {ROUNDS} rounds in turns:",
        {
            "": "",
            "block-forwards": "",
            "of the loop's": ".2f",
            "seconds": ".2f",
            "of the loop's seconds": ".2f",
            "peak GB beside the weights": ".2f",
            "largest difference of a loss": ".1e",
        },
    )
    for name in ways:
        difference = largest_difference(found[name], found["plain loop"])
        table.add(
            name,
            forwards[name],
            forwards[name] / forwards["plain loop"],
            Spread.of(times[name]),
            Spread.of(ratios(times[name], times["plain loop"])),
            peaks[name],
            difference,
        )
        findings.judge(f"{name}, losses from the plain loop's", difference, bench.bfloat16.tolerance)
    return findings


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Of measurements taken in turns."""
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def with_peak(run: Callable[[], Losses], device: torch.device) -> tuple[Losses, float | None]:
    """What `run` returns, and the gigabytes that it took on a GPU beside what was there before."""
    if device.type != "cuda":
        return run(), None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    return result, (torch.cuda.max_memory_allocated(device) - before) / GIGABYTE


@dataclass(frozen=True)
class Pair:
    """A prefill and a decode model, and for each decode layer the prefill layer whose keys and values it reads."""

    prefill: PreTrainedModel
    decode: PreTrainedModel
    layer_map: Sequence[int]

    @classmethod
    def without(cls, dense: PreTrainedModel, prefill: Blocks, decode: Blocks) -> Pair:
        """Models that go without these blocks; they share the weights of `dense`."""
        blocks = dense.config.num_hidden_layers
        layer_map = kv_layer_map(BlockPlan(blocks, prefill), BlockPlan(blocks, decode))
        return cls(drop_blocks(dense, prefill), drop_blocks(dense, decode), layer_map)

    @torch.no_grad()
    def answer(self, bench: Bench, prompts: Tensor) -> tuple[float, float]:
        """Milliseconds from prompts (batch, time) to their first tokens, and from one decoded token to the next.

        The handover counts to the latter; within one process it copies no numbers.
        """
        new_tokens = bench.size.new_tokens
        cache = DynamicCache(config=self.prefill.config)
        start = bench.now()
        logits = self.prefill(input_ids=prompts, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        first = bench.now()
        received = handover(cache, self.layer_map, self.decode.config)
        for _ in range(new_tokens - 1):
            logits = self.decode(input_ids=token, past_key_values=received, use_cache=True).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
        last = bench.now()
        return 1000 * (first - start), 1000 * (last - first) / (new_tokens - 1)


def nested(blocks: int, prefill: int, decode: int) -> tuple[Blocks, Blocks]:
    """So many blocks for each stage to go without, spread over the depth; decode's contain prefill's."""
    removed = [(2 * number + 1) * blocks // (2 * decode) for number in range(decode)]
    step = decode // prefill
    return frozenset(removed[::step][:prefill]), frozenset(removed)


def speed(bench: Bench) -> Findings:
    """Time to first token and inter-token latency, dense and of a pruned pair, which take turns."""
    model, size = bench.shaped, bench.size
    prefill, decode = nested(model.config.num_hidden_layers, *size.shape_remove)
    without = f"prefill −{len(prefill)}, decode −{len(decode)}"
    pairs = {"dense": Pair.without(model, frozenset(), frozenset()), without: Pair.without(model, prefill, decode)}
    findings = Findings()
    table = findings.table(
        f"{described(model)}. Prompts of {size.prompt_tokens} tokens, answers of {size.new_tokens}, median (lowest–"
        f"highest) of {size.repeats} runs in turns:",
        {
            "batch": "",
            "": "",
            "to the first token, ms": ".1f",
            "of dense": ".2f",
            "token to token, ms": ".2f",
            "of dense's": ".2f",
            "KV handed over, MB": ".0f",
        },
    )
    for batch in BATCHES:
        prompts = random_tokens(bench, batch)
        first: dict[str, list[float]] = {name: [] for name in pairs}
        others: dict[str, list[float]] = {name: [] for name in pairs}
        for repeat in range(size.repeats + 1):
            for name, pair in pairs.items():
                to_first, to_next = pair.answer(bench, prompts)
                if repeat:  # The first one warms up.
                    first[name].append(to_first)
                    others[name].append(to_next)
        for name, pair in pairs.items():
            table.add(
                batch,
                name,
                Spread.of(first[name]),
                Spread.of(ratios(first[name], first["dense"])),
                Spread.of(others[name]),
                Spread.of(ratios(others[name], others["dense"])),
                batch * cache_bytes(pair.decode, size.prompt_tokens, model.dtype) / 1e6,
            )

    memory = findings.table("Each by itself, one prompt:", {"": "", "model": "", "peak, GB": ".2f"})
    alone = {"dense": model, "prefill": pairs[without].prefill, "decode": pairs[without].decode}
    found = speeds(alone, random_tokens(bench, 1), new_tokens=size.new_tokens, repeats=1)
    for name, one in alone.items():
        peak = found[name].peak_memory_bytes
        memory.add(name, described(one), None if peak is None else peak / GIGABYTE)
    return findings
