"""Every causal language model type of transformers put through the method, and held against a truth of its own.

    python -m benchmarks.architectures --table docs/reference/architectures.md
    python -m benchmarks.architectures llama gemma3_text --table docs/reference/architectures.md

Each type gets a tiny random model of 8 blocks in a process of its own. The truth is the dense model with forward hooks
that put a block's input in place of its output; it knows nothing of how this repository finds, drops or renumbers
blocks. Compared are losses of the search, pruned models in memory, exported checkpoints as plain transformers loads
them, generation with and without a cache, pairs, training, streaming, and the bytes that a cache is said to hold.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import re
import resource
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from benchmarks.tiny_architectures import BLOCKS, VOCABULARY, WINDOW, causal_types, tiny_config, tiny_model
from benchmarks.tiny_whole_models import FAMILIES, logits, question, reloaded_whole, whole_model
from pdtrim.contract.architectures import LAST_STAYS, VISION_LANGUAGE, protected_for_vision
from pdtrim.contract.errors import PDTrimError
from pdtrim.contract.kv_cache import kv_numbers
from pdtrim.contract.spec import JobSpec
from service.checking.preflight import check_config
from service.stopping import go_on
from workers.pruning.model.blocks import UnsupportedArchitecture, block_stack, drop_blocks, try_out
from workers.pruning.model.building import ImpossibleModel
from workers.pruning.model.cache import cache_bytes
from workers.pruning.model.checkpoint import (
    BrokenCheckpoint,
    SourceTensors,
    check_complete,
    load_checkpoint,
    write_checkpoint,
)
from workers.pruning.model.composite import Composite
from workers.pruning.model.costs import costs_of
from workers.pruning.model.pair import first_token_losses, pd_loss
from workers.pruning.model.streaming import load_streamed
from workers.pruning.model.units import deleting
from workers.pruning.repair.distill import heal, trainable
from workers.pruning.repair.training import Journal, TrainingSettings
from workers.pruning.search.engine import PairEngine, WholeEngine
from workers.pruning.serving.handover import EVERY_TOKEN
from workers.pruning.serving.pair_server import DecodeHalf, PrefillDecodePair, PrefillHalf
from workers.stages.proving import prove_architecture, prove_continuation, prove_decoder, prove_halves

Outcome = Literal["works", "unified only", "refused", "foreign words", "late failure", "silently wrong", "not built"]
OUTCOMES: tuple[Outcome, ...] = (
    *("works", "unified only", "refused", "foreign words", "late failure", "silently wrong", "not built"),
)
TOKENS, PROMPT, NEW_TOKENS = 26, 14, 6
TOLERANCE = 1e-5
"""Of the largest logit."""
LOSS_TOLERANCE = 1e-3
MOST_PARAMETERS = 20_000_000
SECONDS = 300
"""Of the processor, for one type."""
MEMORY_BYTES = 4 << 30
OURS = (UnsupportedArchitecture, ImpossibleModel, BrokenCheckpoint, PDTrimError)


@dataclass(frozen=True)
class Finding:
    """What became of one type, and in whose words."""

    model_type: str
    outcome: Outcome
    said: str = ""
    notes: list[str] = field(default_factory=list)
    """What is wrong besides, such as a number."""
    kv_bytes: int | None = None
    """What the cache of one request holds after `TOKENS` tokens, where it came to that."""


def removed_sets(blocks: int, protected: frozenset[int]) -> list[frozenset[int]]:
    """What one checkpoint gives up in turn of so many blocks."""
    found = ({1}, {0}, {2, blocks - 3}, {blocks - 1})
    return [frozenset(removed) for removed in found if not removed & protected]


def pairs(blocks: int, protected: frozenset[int]) -> list[tuple[frozenset[int], frozenset[int]]]:
    """What prefill and decode give up in turn."""
    found = (({2}, {2, (blocks + 2) // 2}), ({0}, {0, blocks - 1}))
    return [(frozenset(prefill), frozenset(decode)) for prefill, decode in found if not decode & protected]


class SilentlyWrong(Exception):
    """Something gave another result than the truth, and no error."""


class LateMismatch(Exception):
    """An exported checkpoint is not what it should be, and the export stage would say so, after the search."""


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The model's blocks, for the truth: the outermost list that has as many as there are. Raises: LookupError."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise LookupError(f"no list of {count} modules")
    return min(lists, key=lambda found: found[0].count("."))[1]


@contextmanager
def without(model: PreTrainedModel, removed: frozenset[int]) -> Iterator[None]:
    """Until the end the blocks `removed` change nothing: their input stands in place of their output."""

    def hook(block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        h = args[0] if args else kwargs["hidden_states"]
        return (h, *output[1:]) if isinstance(output, tuple | list) else h

    blocks = decoder_blocks(model)
    handles = [blocks[block].register_forward_hook(hook, with_kwargs=True) for block in removed]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def true_logits(model: PreTrainedModel, ids: Tensor, removed: frozenset[int]) -> Tensor:
    """Logits (batch, time, vocabulary) of the model without `removed`."""
    with without(model, removed):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def true_pair_logits(
    model: PreTrainedModel, ids: Tensor, handed: int, prefill: frozenset[int], decode: frozenset[int]
) -> Tensor:
    """Logits (batch, time − handed, vocabulary) of a decode half on the cache that a prefill half made."""
    cache = DynamicCache(config=model.config)
    with without(model, prefill):
        model(input_ids=ids[:, :handed], past_key_values=cache, use_cache=True)
    with without(model, decode):
        parts = ids[:, handed:].split(1, dim=1)
        logits = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in parts]
    return torch.cat(logits, dim=1)


def true_greedy(logits_of: Callable[[Tensor], Tensor], ids: Tensor, new_tokens: int) -> Tensor:
    """Prompts `ids` (batch, time) and their greedy continuation, every token computed from the whole sequence."""
    for _ in range(new_tokens):
        ids = torch.cat([ids, logits_of(ids)[:, -1:].argmax(-1)], dim=1)
    return ids


def compare(what: str, found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raises: SilentlyWrong."""
    difference = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
    if not difference <= tolerance:
        raise SilentlyWrong(f"{what}: differs by {difference:.1e} of the largest")


def equal(what: str, found: Tensor, wanted: Tensor) -> None:
    """Raises: SilentlyWrong."""
    if not torch.equal(found, wanted):
        raise SilentlyWrong(f"{what}: other tokens")


def foreign(error: BaseException) -> bool:
    """Whether an error has another library's words in it, or is none of ours."""
    cause = error.__cause__
    return not isinstance(error, OURS) or (
        cause is not None and not isinstance(cause, OURS) and " ".join(str(cause).split())[:60] in str(error)
    )


UNIFIED = {"prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 1}}
PAIR = {"prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}}


def protected_blocks(config: dict[str, Any]) -> frozenset[int]:
    """What a job has to protect of a model, which the refusal without says."""
    sight, kind = frozenset(range(protected_for_vision(config))), config.get("model_type")
    return sight | {BLOCKS - 1} if kind in LAST_STAYS else sight


def gateway(config: dict[str, Any], target: dict[str, Any]) -> None:
    """What the gateway says of a job. Raises: PDTrimError."""
    spec = JobSpec.model_validate(
        {
            "model": {"source": "/models/tiny"},
            "calibration": {"window_tokens": 32},
            "evaluation": {"speed_tokens": 8},
            "search": {"protect": sorted(protected_blocks(config))},
            **target,
        }
    )
    check_config(spec, config)


def proved(folder: Path, protected: frozenset[int]) -> PreTrainedModel:
    """The model, if the worker takes it on. Raises: what scoring raises before it begins."""
    check_complete(folder)
    model = load_checkpoint(folder, dtype=torch.float32, device=torch.device("cpu"))
    stack = block_stack(model)
    try_out(stack, torch.ones(1, 8, dtype=torch.long))
    prove_architecture(stack, folder, removable=1, protected=protected, check=go_on)
    prove_continuation(stack, "decode", protected)
    prove_continuation(stack, "prefill", protected)
    return model


def check_unified(folder: Path, dense: PreTrainedModel, ids: Tensor, protected: frozenset[int]) -> None:
    """Raises: SilentlyWrong; whatever breaks."""
    stack = block_stack(dense)
    engine = WholeEngine(stack, ids, "kl", chunk_windows=2)
    reference = true_logits(dense, ids[:, :-1], frozenset()).log_softmax(-1)
    blocks = len(stack.blocks)
    for removed in removed_sets(blocks, protected):
        name = f"without {sorted(removed)}"
        truth = true_logits(dense, ids, removed)
        units = deleting(removed)
        loss = F.kl_div(truth[:, :-1].log_softmax(-1), reference, log_target=True, reduction="sum") / ids[:, 1:].numel()
        compare(f"{name}, the search's loss", torch.tensor(engine.losses([units])[units]), loss, LOSS_TOLERANCE)
        pruned = drop_blocks(dense, removed)(input_ids=ids, use_cache=False).logits
        compare(f"{name}, pruned in memory", pruned, truth)
        target = folder.parent / f"export-{'-'.join(map(str, sorted(removed)))}"
        kept = [block for block in range(blocks) if block not in removed]
        write_checkpoint(folder, target, kept=kept, overrides=SourceTensors({}), pdtrim={}, model_card="")
        loaded: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        exported = loaded(input_ids=ids, use_cache=False).logits
        if not torch.allclose(exported, pruned, atol=1e-4):
            raise LateMismatch(f"{name}, exported: not what it is in memory, which the export stage says")
        compare(f"{name}, exported", exported, truth)
        wanted = true_greedy(partial(true_logits, dense, removed=removed), ids[:, :PROMPT], NEW_TOKENS)
        for use_cache in (True, False):
            found = loaded.generate(
                ids[:, :PROMPT],
                attention_mask=torch.ones_like(ids[:, :PROMPT]),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                use_cache=use_cache,
                pad_token_id=0,
                eos_token_id=None,
            )
            equal(f"{name}, exported, generating {'with' if use_cache else 'without'} a cache", found, wanted)
        shutil.rmtree(target)


def check_continuations(dense: PreTrainedModel, ids: Tensor, protected: frozenset[int]) -> None:
    """The search's losses on continuations, which every job has. Raises: SilentlyWrong; whatever breaks."""
    stack = block_stack(dense)
    for prefill, decode in pairs(len(decoder_blocks(dense)), protected):
        name = f"prefill without {sorted(prefill)}, decode without {sorted(decode)}"
        engine = PairEngine(
            stack,
            ids,
            "cross_entropy",
            prefill=deleting(prefill),
            prompt_tokens=PROMPT,
            first_token="decode",
            chunk_windows=2,
        )
        logits = true_pair_logits(dense, ids[:, :-1], PROMPT - 1, prefill, decode)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, PROMPT:].flatten())
        units = deleting(decode)
        for _ in range(2):  # Whoever writes into what it was given shows the second time.
            compare(f"{name}, the search's loss", torch.tensor(engine.losses([units])[units]), loss, LOSS_TOLERANCE)
        halves, layer_map = pruned_halves(dense, prefill, decode)
        measured = pd_loss(*halves, layer_map, ids, prompt_tokens=PROMPT, first_token="decode", batch=2)
        compare(f"{name}, the evaluation's loss", torch.tensor(measured), loss, LOSS_TOLERANCE)
        first_token_losses(*halves, layer_map, ids, prompt_tokens=PROMPT, batch=2)


def pruned_halves(
    dense: PreTrainedModel, prefill: frozenset[int], decode: frozenset[int]
) -> tuple[tuple[PreTrainedModel, PreTrainedModel], tuple[int, ...]]:
    """Both halves in memory, and for each layer of decode the layer of prefill that it goes on from."""
    blocks = range(len(decoder_blocks(dense)))
    kept = [block for block in blocks if block not in prefill]
    layer_map = tuple(kept.index(block) for block in blocks if block not in decode)
    return (drop_blocks(dense, prefill), drop_blocks(dense, decode)), layer_map


def check_pair(dense: PreTrainedModel, ids: Tensor, protected: frozenset[int]) -> None:
    """Both halves as they are served. Raises: SilentlyWrong; whatever breaks."""
    for prefill, decode in pairs(len(decoder_blocks(dense)), protected):
        (one, other), layer_map = pruned_halves(dense, prefill, decode)
        pair = PrefillDecodePair(PrefillHalf(one, layer_map, EVERY_TOKEN, "decode"), DecodeHalf(other, layer_map))
        found = pair.decode(pair.prefill(ids[:, :PROMPT]), NEW_TOKENS)
        logits_of = partial(true_pair_logits, dense, handed=PROMPT - 1, prefill=prefill, decode=decode)
        wanted = true_greedy(logits_of, ids[:, :PROMPT], NEW_TOKENS)
        name = f"prefill without {sorted(prefill)}, decode without {sorted(decode)}"
        equal(f"{name}, served", found, wanted[:, PROMPT:])


def check_training(dense: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> None:
    """Two steps of healing, saved in between. Raises: whatever breaks."""
    removed = removed_sets(len(decoder_blocks(dense)), frozenset())[2]
    kept = [block for block in range(len(decoder_blocks(dense))) if block not in removed]
    parameters = trainable(dense, kept, frozen=set())

    def save(last: bool, state: Callable[[], dict[str, Tensor]]) -> None:
        state()

    heal(
        drop_blocks(dense, removed),
        teacher,
        kept,
        parameters,
        windows=ids.repeat(2, 1),
        held_out=ids,
        settings=TrainingSettings(steps=2, batch_windows=2, learning_rate=1e-4, seed=0),
        journal=Journal(save=save),
    )


def check_streaming(folder: Path, dense: PreTrainedModel, ids: Tensor) -> None:
    """Raises: SilentlyWrong; whatever breaks."""
    if check_complete(folder).one_to_one:
        model, _ = load_streamed(folder, dtype=torch.float32, device=torch.device("cpu"))
        compare(
            "read block by block",
            model(input_ids=ids, use_cache=False).logits,
            dense(input_ids=ids, use_cache=False).logits,
        )


def tensors_of(value: object, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor of numbers somewhere in a cache, each once; counters of tokens, which are integers, are none."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(part, seen)
    elif type(value).__module__.startswith("transformers."):
        yield from tensors_of(vars(value), seen)


def held_bytes(model: PreTrainedModel, ids: Tensor) -> int:
    """What the cache that transformers makes by itself holds of one prompt (1, time)."""
    cache = model(input_ids=ids, use_cache=True).past_key_values
    return sum(tensor.nbytes for tensor in tensors_of(cache, set()))


def kv_notes(config: Mapping[str, Any], dense: PreTrainedModel, ids: Tensor) -> list[str]:
    """What a job would say of the bytes of a request (1, time) that is not so: report, budget and estimate.

    The report's figures are of both checkpoints, served in bfloat16 as in float32; the estimate's is of one token more,
    while all windows have room.
    """
    found: list[str] = []

    def hold(what: str, said: int | None, held: int) -> None:
        if said != held:
            found.append(f"{what} says {said} bytes of cache, and {held} are held")

    for name, model in (("dense", dense), ("pruned", drop_blocks(dense, {2}))):
        half: Any = copy.deepcopy(model)
        half.to(torch.bfloat16)
        hold(f"the report, {name},", cache_bytes(model, ids.shape[1], torch.float32), held_bytes(model, ids))
        hold(f"the report, {name} in bfloat16,", cache_bytes(model, ids.shape[1], half.dtype), held_bytes(half, ids))
    hold("a budget", costs_of(block_stack(dense), "kv_bytes", ids).dense, held_bytes(dense, ids))
    kept = kv_numbers(config)
    more = held_bytes(dense, ids[:, : WINDOW - 2]) - held_bytes(dense, ids[:, : WINDOW - 3])
    hold("the estimate, of a token,", None if kept is None else 4 * sum(kept), more)
    return found


def check_whole(composite: Composite, text: Path, whole: PreTrainedModel, protected: frozenset[int]) -> None:
    """The text decoder put back in its place, asked about an image. Raises: SilentlyWrong; whatever breaks."""
    asked = question(whole.config.model_type)
    blocks = len(decoder_blocks(whole))
    for removed in removed_sets(blocks, protected):
        kept = [block for block in range(blocks) if block not in removed]
        pruned, target = text.parent / "pruned", text.parent / "pruned-whole"
        write_checkpoint(text, pruned, kept=kept, overrides=SourceTensors({}), pdtrim={}, model_card="")
        composite.write_whole(pruned, target, kept)
        with without(whole, removed):
            truth = logits(whole, asked)
        compare(f"whole without {sorted(removed)}, of an image", logits(reloaded_whole(target), asked), truth)
        shutil.rmtree(pruned)
        shutil.rmtree(target)


class NotBuilt(Exception):
    """transformers itself cannot make or run a tiny model of the type."""


def build(model_type: str) -> tuple[dict[str, Any], Callable[[], PreTrainedModel]]:
    """A tiny model's `config.json`, and what makes the model. Raises: whatever transformers raises."""
    if model_type in FAMILIES:
        seeing = whole_model(model_type)
        return json.loads(seeing.config.to_json_string()), lambda: seeing
    config = tiny_config(model_type)

    def blind() -> PreTrainedModel:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            raise NotBuilt(f"{size} parameters")
        return tiny_model(config)

    return json.loads(config.to_json_string()), blind


def examine(model_type: str, workdir: Path) -> Finding:
    """Put one type through everything; of one that sees, its text decoder, and the whole model with it."""
    try:
        content, make = build(model_type)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the finding)
        return Finding(model_type, "not built", _line(error))
    try:
        gateway(content, UNIFIED)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the finding)
        return Finding(model_type, "foreign words" if foreign(error) else "refused", _line(error))
    folder = workdir / "dense"
    ids = torch.randint(1, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    protected = protected_blocks(content)
    try:
        model = make()
        model(input_ids=ids, use_cache=False)
        model.save_pretrained(folder)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the finding)
        return Finding(model_type, "not built", _line(error))
    try:
        composite = Composite.of(folder)
        if composite is not None:
            folder = workdir / "text"
            composite.write_text(folder)
        dense = proved(folder, protected)
        if composite is not None:
            prove_decoder(block_stack(dense), model)
        student = load_checkpoint(folder, dtype=torch.float32, device=torch.device("cpu"))
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the finding)
        return Finding(model_type, "foreign words" if foreign(error) else "refused", _line(error))
    try:
        if composite is not None:
            check_whole(composite, folder, model, protected)
        check_unified(folder, dense, ids, protected)
        check_continuations(dense, ids, protected)
        with torch.enable_grad():
            check_training(student, dense, ids)
        check_streaming(folder, dense, ids)
        text = content if composite is None else composite.config
        found = partial(Finding, notes=kv_notes(text, dense, ids[:1]), kv_bytes=held_bytes(dense, ids[:1]))
    except SilentlyWrong as error:
        return Finding(model_type, "silently wrong", str(error))
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the finding)
        return Finding(model_type, "late failure", _line(error))
    try:
        gateway(content, PAIR)
        prove_halves(block_stack(dense), "decode", protected)
        prove_halves(block_stack(dense), "prefill", protected)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the finding)
        return found(model_type, "foreign words" if foreign(error) else "unified only", _line(error))
    try:
        check_pair(dense, ids, protected)
    except SilentlyWrong as error:
        return found(model_type, "silently wrong", str(error))
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the finding)
        return found(model_type, "late failure", _line(error))
    return found(model_type, "works", f"with `search.protect: {sorted(protected)}`" if protected else "")


def _remark(finding: Finding) -> str:
    """What the table says beside the outcome: our sentence without what every such sentence has."""
    text = re.sub(r"^\w+: |^(model_type '\S+' is not supported: )|; this service prunes.*", "", finding.said)
    text = re.sub(r"^model_type '\S+' is not supported: |/\S*/dense", "", text)
    return "; ".join(filter(None, [text, *finding.notes])).replace("|", "\\|")


def _row(finding: Finding) -> str:
    held = "" if finding.kv_bytes is None else f"{finding.kv_bytes:,}"
    return f"| `{finding.model_type}` | {finding.outcome} | {held} | {_remark(finding)} |"


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _child(model_type: str, ours: Connection) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with torch.no_grad(), tempfile.TemporaryDirectory() as workdir:
        ours.send(examine(model_type, Path(workdir)))


def sweep(types: Sequence[str]) -> Iterator[Finding]:
    """Each type in a process of its own, which may take so long and so much memory."""
    context = multiprocessing.get_context("fork")
    for model_type in types:
        answer, ours = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(model_type, ours))
        process.start()
        ours.close()
        try:
            yield answer.recv()
        except EOFError:
            yield Finding(model_type, "late failure", f"no answer within {SECONDS} s and {MEMORY_BYTES >> 30} GiB")
        process.join()


ROW = re.compile(rf"^\| `(\S+)` \| ({'|'.join(OUTCOMES)}) \|.*", re.M)


def rows_of(page: Path) -> dict[str, str]:
    """The rows that the page of the documentation has, by type."""
    return {row[1]: row[0] for row in ROW.finditer(page.read_text())}


def table(rows: Mapping[str, str]) -> str:
    """The page of the documentation, of each type's row."""
    counts = Counter(found[2] for found in map(ROW.match, rows.values()) if found is not None)
    lines = [
        "# Architectures",
        "",
        f"Every `model_type` that transformers {transformers.__version__} has a causal language model of, put through",
        "the method as a tiny random model and held against the dense model with hooks in place of the removed blocks.",
        "`make architectures` writes this page.",
        "",
        "*Works* is a pair or one checkpoint; *unified only* is one checkpoint for both halves, which is said when the",
        "job is submitted or before it begins; *refused* is refused then, with the reason.",
        "",
        f"Of vision-language models ({', '.join(f'`{kind}`' for kind in sorted(VISION_LANGUAGE))}) the text decoder is",
        "[pruned in its place](../guides/jobs.md#models), and the whole model is asked about an image.",
        "",
        "| outcome | types |",
        "|---|---|",
        *(f"| {outcome} | {counts[outcome]} |" for outcome in OUTCOMES),
        "",
        f"*KV bytes* are what the cache of one request holds after {TOKENS} tokens in float32, as transformers fills",
        "it, and as the report and a budget of KV bytes count it; the estimate's bytes of a token are held to it too.",
        "",
        "| `model_type` | outcome | KV bytes | |",
        "|---|---|---|---|",
        *(row for _, row in sorted(rows.items())),
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; all where none are given")
    parser.add_argument("--table", type=Path, help="write the table of the documentation, or its rows of these types")
    arguments = parser.parse_args()
    findings = []
    rows: dict[str, str] = {}
    for finding in sweep(arguments.types or causal_types()):
        findings.append(finding)
        rows[finding.model_type] = _row(finding)
        print(finding.model_type, "|", finding.outcome, "|", finding.said, "|", *finding.notes, flush=True)
        if arguments.table:  # A sweep that is ended early leaves what it has found.
            arguments.table.write_text(table(rows_of(arguments.table) | rows))
    counts = Counter(finding.outcome for finding in findings)
    print(", ".join(f"{outcome} {counts[outcome]}" for outcome in OUTCOMES))
    if arguments.table and not arguments.types:
        arguments.table.write_text(table(rows))
    return int(any(counts[outcome] for outcome in OUTCOMES[3:6]) or any(finding.notes for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
