"""Pairs of checkpoints to serve, and the tokens that transformers gives for them. Runs where `workers` is installed.

Call it as `python serving/vllm_tests/make_pairs.py FOLDER NAME…`; see `PAIRS` for the names. Each pair is a folder with
`prefill` and `decode` (or `unified`) and `expected.json`, see `Case`. `--expect FOLDER` writes the latter for
checkpoints that are there.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    Gemma3TextConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

import workers
from workers.pruning.model.blocks import block_stack
from workers.pruning.model.calibration import stdlib_documents
from workers.pruning.model.checkpoint import SourceTensors, empty_model, write_checkpoint
from workers.pruning.model.pair import handover
from workers.pruning.model.parts import zeroed_tensors
from workers.pruning.model.plan import BlockPlan, kv_layer_map

REFERENCE = Path(workers.__file__).parent / "reference_model"
PROMPT_TOKENS = (
    1,
    2,
    5,
    7,
    12,
    20,
    31,
    32,
    33,
    47,
    48,
    63,
    64,
    65,
    80,
    96,
    97,
    100,
    128,
    129,
    150,
    192,
    200,
    256,
    257,
    300,
)
"""Among them lengths on and beside the borders of blocks of 32 and 64 tokens."""
NEW_TOKENS = 24
ROUNDING = 0.003
"""Logits of two programs in float32 may differ by less."""


@dataclass(frozen=True)
class Case:
    """A prompt, and the greedy continuations of it."""

    prompt: list[int]
    decode: list[int]
    """Decode reads the prompt's last token again and says the first token."""
    prefill: list[int]
    """Prefill says the first token."""
    alone: dict[str, list[int]]
    """Role → what that checkpoint alone goes on with."""


@dataclass(frozen=True)
class Pair:
    """A dense model, and the blocks that each half gives up."""

    model: Callable[[Path], Path]
    """Writes the dense model into a folder, or says where it is."""
    prefill: BlockPlan
    decode: BlockPlan
    made: str
    """What is entered as the job."""


def random_model(config: PretrainedConfig) -> Callable[[Path], Path]:
    """Weights large enough for every block to matter."""

    def write(folder: Path) -> Path:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(REFERENCE / name, folder / name)
        return folder

    return write


SHARED: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
QWEN3 = Qwen3Config(**SHARED, num_hidden_layers=14, num_key_value_heads=2)
GEMMA3 = Gemma3TextConfig(
    **SHARED,
    num_hidden_layers=12,
    num_key_value_heads=1,
    sliding_window=32,
    query_pre_attn_scalar=32,
    layer_types=["full_attention" if (index + 1) % 6 == 0 else "sliding_attention" for index in range(12)],
)
QWEN3_12 = Qwen3Config(**SHARED, num_hidden_layers=12, num_key_value_heads=2)
QWEN2 = Qwen2Config(**SHARED, num_hidden_layers=12, num_key_value_heads=2)
MISTRAL = MistralConfig(**SHARED, num_hidden_layers=12, num_key_value_heads=2, sliding_window=None)
PHI3 = Phi3Config(**SHARED, num_hidden_layers=12, num_key_value_heads=2)
OLMO2 = Olmo2Config(**SHARED, num_hidden_layers=12, num_key_value_heads=2)
OUTER_PREFILL = BlockPlan(12, parts={0: "kv_only", 4: "mlp", 5: "kv_only", 6: "kv_only", 11: "kv_only"})
OUTER_DECODE = BlockPlan(12, frozenset({3}), parts={0: "attention", 5: "attention", 6: "mlp", 11: "attention"})
"""First and last blocks among them, and neighbours."""
WINDOWED_DECODE = BlockPlan(12, frozenset({3}), parts={0: "attention", 4: "attention", 6: "mlp", 11: "attention"})
"""Which leaves Gemma 3 attentions with a window and without one."""
PAIRS = {
    "reference": Pair(
        lambda folder: REFERENCE,
        BlockPlan(12, frozenset({8, 9})),
        BlockPlan(12, frozenset({5, 7, 8, 9})),
        "job_reference",
    ),
    "other": Pair(
        lambda folder: REFERENCE, BlockPlan(12, frozenset({7, 8})), BlockPlan(12, frozenset({5, 7, 8, 9})), "job_other"
    ),
    "unified": Pair(
        lambda folder: REFERENCE, BlockPlan(12, frozenset({7, 8})), BlockPlan(12, frozenset({7, 8})), "job_unified"
    ),
    "parts": Pair(
        lambda folder: REFERENCE,
        BlockPlan(12, parts={7: "kv_only", 8: "kv_only", 9: "mlp"}),
        BlockPlan(12, frozenset({5}), parts={3: "attention", 8: "mlp"}),
        "job_parts",
    ),
    "qwen3_parts": Pair(random_model(QWEN3_12), OUTER_PREFILL, OUTER_DECODE, "job_qwen3_parts"),
    "gemma3_parts": Pair(random_model(GEMMA3), OUTER_PREFILL, WINDOWED_DECODE, "job_gemma3_parts"),
    "qwen2_parts": Pair(random_model(QWEN2), OUTER_PREFILL, OUTER_DECODE, "job_qwen2_parts"),
    "mistral_parts": Pair(random_model(MISTRAL), OUTER_PREFILL, OUTER_DECODE, "job_mistral_parts"),
    "phi3_parts": Pair(random_model(PHI3), OUTER_PREFILL, OUTER_DECODE, "job_phi3_parts"),
    "olmo2_parts": Pair(random_model(OLMO2), OUTER_PREFILL, OUTER_DECODE, "job_olmo2_parts"),
    "dense": Pair(lambda folder: REFERENCE, BlockPlan(12), BlockPlan(12), "job_dense"),
    "qwen3": Pair(random_model(QWEN3), BlockPlan(14, frozenset({6})), BlockPlan(14, frozenset({3, 6, 9})), "job_qwen3"),
    "gemma3": Pair(
        random_model(GEMMA3), BlockPlan(12, frozenset({7})), BlockPlan(12, frozenset({2, 7, 8})), "job_gemma3"
    ),
}


def write_pair(folder: Path, pair: Pair) -> None:
    """The checkpoints of a pair, or the unified one."""
    with tempfile.TemporaryDirectory() as scratch:
        source = pair.model(Path(scratch) / "dense")
        nothing = Path(scratch) / "nothing"
        nothing.mkdir()
        halves = {"prefill": pair.prefill, "decode": pair.decode}
        for role, plan in {"unified": pair.prefill}.items() if pair.prefill == pair.decode else halves.items():
            pdtrim = {
                "format_version": 1,
                "role": role,
                "source": {"uri": source.name, "revision": None},
                "num_source_blocks": plan.num_blocks,
                "kept_blocks": list(plan.kept),
                "kv_layer_map": kv_layer_map(pair.prefill, pair.decode),
                **({"dead_units": {str(block): part for block, part in plan.parts.items()}} if plan.parts else {}),
                "job": pair.made,
            }
            stack = block_stack(empty_model(source))
            write_checkpoint(
                source,
                folder / role,
                kept=plan.kept,
                overrides=SourceTensors({}),
                zeroed=zeroed_tensors(stack, plan.parts),
                pdtrim=pdtrim,
                model_card="A checkpoint for tests.\n",
            )


def prompts(vocabulary: int, count: int) -> Iterator[list[int]]:
    """Prompts of so many tokens, source text and random ones in turn, without end."""
    drawn = random.Random(count)
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    text = tokenizer("\n".join(islice(stdlib_documents("validation"), 4))[:40_000]).input_ids
    while True:
        begin = drawn.randrange(len(text) - count)
        yield text[begin : begin + count]
        yield [drawn.randrange(3, vocabulary) for _ in range(count)]


@dataclass
class Walk:
    """Greedy tokens, and how clear the least clear of them was."""

    tokens: list[int] = field(default_factory=list)
    margin: float = inf
    """The smallest distance of the two highest logits: below that of roundings, either token is right."""

    def add(self, logits: Tensor) -> None:
        """The next token, by its logits (vocabulary,)."""
        first, second = logits.topk(2).values.tolist()
        self.margin = min(self.margin, first - second)
        self.tokens.append(int(logits.argmax()))


@torch.no_grad()
def walk(
    prefill: PreTrainedModel, decode: PreTrainedModel, layer_map: Sequence[int], ids: list[int], first: str
) -> Walk:
    """`NEW_TOKENS` greedy tokens of a pair whose first token is said by the half `first`."""
    walked, cache = Walk(), DynamicCache(config=decode.config)
    if handed := ids if first == "prefill" else ids[:-1]:
        empty = DynamicCache(config=prefill.config)
        read = prefill(input_ids=torch.tensor([handed]), past_key_values=empty, use_cache=True)
        cache = handover(read.past_key_values, layer_map, decode.config)
        if first == "prefill":
            walked.add(read.logits[0, -1])
    while len(walked.tokens) < NEW_TOKENS:
        last = [*ids[-1:], *walked.tokens][-1]
        walked.add(decode(input_ids=torch.tensor([[last]]), past_key_values=cache, use_cache=True).logits[0, -1])
    return walked


@torch.no_grad()
def alone(model: PreTrainedModel, ids: list[int]) -> list[int]:
    """`NEW_TOKENS` greedy tokens of one checkpoint."""
    cache, step, tokens = DynamicCache(config=model.config), torch.tensor([ids]), list[int]()
    while len(tokens) < NEW_TOKENS:
        logits = model(input_ids=step, past_key_values=cache, use_cache=True).logits
        tokens.append(int(logits[0, -1].argmax()))
        step = torch.tensor([tokens[-1:]])
    return tokens


def expect(folder: Path) -> None:
    """Write `expected.json` beside the checkpoints of `folder`."""
    roles = ["unified"] if (folder / "unified").is_dir() else ["prefill", "decode"]
    models = [AutoModelForCausalLM.from_pretrained(folder / role, dtype=torch.float32).eval() for role in roles]
    layer_map = json.loads((folder / roles[-1] / "pdtrim.json").read_text())["kv_layer_map"]
    cases = []
    for count in PROMPT_TOKENS:
        for ids in prompts(models[-1].config.vocab_size, count):
            walks = [walk(models[0], models[-1], layer_map, ids, first) for first in ("decode", "prefill")]
            if min(walked.margin for walked in walks) > ROUNDING:
                break
        continued = {role: alone(model, ids) for role, model in zip(roles, models, strict=True)}
        cases.append(Case(ids, walks[0].tokens, walks[1].tokens, continued))
    (folder / "expected.json").write_text(json.dumps([asdict(case) for case in cases]))
    for first in ("decode", "prefill"):
        same = sum(getattr(case, first) == case.alone[roles[-1]] for case in cases)
        print(f"{folder.name}: first token by {first}: {same} of {len(cases)} as {roles[-1]} alone")
    print(f"{folder.name}: {sum(case.decode == case.prefill for case in cases)} of {len(cases)} the same for both")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", choices=[*PAIRS, []])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.names:
        write_pair(arguments.folder / name, PAIRS[name])
        expect(arguments.folder / name)
    if not arguments.names:
        expect(arguments.folder)
