"""Healing on a text, and on the dense model's own answers, at the same number of tokens: a table.

The model loses given blocks, in both halves alike. Three kinds of data: the text as it is; runs of the text, of which
the dense model writes the other half of each window; and requests about passages of it, made by the model's chat
template, which it answers; the latter two also with a loss on the prompts. Measured on documents that no healing saw:
perplexity, and how close the pruned model comes to the dense one on the dense model's own answers to requests.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from service.sources import Exchange, Row, Text
from service.stopping import go_on
from workers.inputs.encoding import Encoded, Encoder
from workers.inputs.models import device, load_model
from workers.inputs.prompts import Prompts
from workers.inputs.windows import Stream
from workers.pruning.model.blocks import block_stack, drop_blocks
from workers.pruning.model.calibration import Frame
from workers.pruning.model.measure import perplexity
from workers.pruning.repair.answering import answers
from workers.pruning.repair.answers import marked, unmarked
from workers.pruning.repair.distill import heal, trainable
from workers.pruning.repair.training import Journal, TrainingSettings

HELD_OUT, VALIDATION, ASKED = 8, 40, 16
"""Windows on which training is judged; those of the validation text, and of requests."""
KEPT_APART = 60
"""Documents for validation."""
REQUESTS = ("Summarise this passage.", "What is this passage about?", "Go on from here.", "Say this in plain words.")
PASSAGE_CHARACTERS = 250


def requests(documents: Sequence[str], seed: int) -> Iterator[Row]:
    """Requests about passages of documents, for as long as they are asked for."""
    chosen = random.Random(seed)
    while True:
        document = chosen.choice(documents)
        start = chosen.randrange(max(1, len(document) - PASSAGE_CHARACTERS))
        passage = document[start : start + PASSAGE_CHARACTERS].partition(" ")[2].rpartition(" ")[0]
        yield Exchange(f"{chosen.choice(REQUESTS)}\n\n{passage}", None, "a request")


def text_windows(encoder: Encoder, documents: Sequence[str], count: int, tokens: int) -> Tensor:
    """The first windows of documents (windows, tokens)."""
    rows: list[Row] = [Text(document, "the text") for document in documents]
    return Stream.of(encoder.encoded(rows), count * tokens).windows(encoder.opening, tokens)[0][:count].to(device())


def own_windows(
    model: PreTrainedModel, encoder: Encoder, rows: Iterator[Row], count: int, tokens: int, seed: int, at_once: int
) -> Tensor:
    """Windows of prompts and the dense model's answers (windows, tokens), `marked`; so many are answered at once."""
    prompts = Prompts(encoder, tokens, count * tokens)
    prompts.rest(rows, go_on)
    found: list[Encoded] = []
    end = encoder.tokenizer.eos_token_id
    batches = range(0, len(prompts.found), at_once)
    for first in track(batches, "answering"):
        batch = prompts.found[first : first + at_once]
        most = tokens - max(map(len, batch))
        asked = [[*encoder.opening, *prompt] for prompt in batch]
        for prompt, answer in zip(batch, answers(model, asked, most_tokens=most, ends=[end], seed=seed), strict=True):
            found.append(Encoded([*prompt, *answer], [*[False] * len(prompt), *[True] * len(answer)]))
        if sum(len(row.ids) for row in found) >= count * tokens:
            break
    ids, counted = Stream.of(found, count * tokens).windows(encoder.opening, tokens)
    return marked(ids[:count], counted[:count]).to(model.device)


@torch.no_grad()
def likeness(model: PreTrainedModel, dense: PreTrainedModel, windows: Tensor) -> tuple[float, float]:
    """KL(dense ‖ model) in nats a token, and the share of tokens found most likely by both, of answers in `windows`."""
    kl = same = tokens = 0.0
    for window in windows.split(1):
        ids, counted = unmarked(window)
        assert counted is not None
        ours, theirs = (
            one(input_ids=ids).logits[:, :-1][counted[:, 1:]].float().log_softmax(-1) for one in (model, dense)
        )
        kl += float(F.kl_div(ours, theirs, reduction="sum", log_target=True))
        same += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
        tokens += len(ours)
    return kl / tokens, same / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("build/real/smollm2-135m-instruct"))
    parser.add_argument("--text", type=Path, default=Path("build/real/brown.jsonl"))
    parser.add_argument("--removed", type=int, nargs="+", default=[3, 4, 5, 16, 17, 18])
    parser.add_argument("--heal-tokens", type=int, default=16_384)
    parser.add_argument("--window-tokens", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--at-once", type=int, default=32, help="prompts that are answered in one batch")
    parser.add_argument("--asked", type=int, default=ASKED, help="windows of requests to measure on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    documents = [json.loads(line)["text"] for line in args.text.open()]
    seen, apart = documents[:-KEPT_APART], documents[-KEPT_APART:]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    encoder = Encoder(tokenizer, Frame.of(tokenizer).opening)

    def load() -> PreTrainedModel:
        model = load_model(args.model, dtype=getattr(torch, args.dtype))
        model.requires_grad_(False)
        return model

    dense, tokens = load(), args.window_tokens
    count = args.heal_tokens // tokens
    validation = text_windows(encoder, apart, VALIDATION, tokens)
    asked = own_windows(dense, encoder, requests(apart, args.seed), args.asked, tokens, args.seed, args.at_once)
    runs: Iterator[Row] = iter([Text(document, "the text") for document in seen])
    data = {
        "the text": text_windows(encoder, seen, count + HELD_OUT, tokens),
        "own answers to runs of the text": own_windows(
            dense, encoder, runs, count + HELD_OUT, tokens, args.seed, args.at_once
        ),
        "own answers to requests": own_windows(
            dense, encoder, requests(seen, args.seed + 1), count + HELD_OUT, tokens, args.seed, args.at_once
        ),
    }
    data |= {f"{name}, prompts counting too": unmarked(windows)[0] for name, windows in list(data.items())[1:]}
    print(f"\nBlocks {args.removed} go; {args.heal_tokens:,} tokens.\n")
    print("| healed on | tokens that count | perplexity of the text | KL on answers | same word on answers | s |")
    print("|---|---|---|---|---|---|")
    print(f"| dense | | {perplexity(dense, validation, batch=8)} | 0 | 100 % | |")
    pruned = drop_blocks(load(), args.removed)
    kl, same = likeness(pruned, dense, asked)
    print(f"| nothing | | {perplexity(pruned, validation, batch=8)} | {kl:.3f} | {same:.1%} | |", flush=True)
    settings = TrainingSettings(count // 8, 8, args.learning_rate, args.seed)
    for name, windows in data.items():
        weights = load()
        kept = [block for block in range(len(block_stack(weights).blocks)) if block not in args.removed]
        student, start = drop_blocks(weights, args.removed), time.process_time()
        heal(
            student,
            dense,
            kept,
            trainable(weights, kept, frozen=set()),
            windows=windows[HELD_OUT:],
            held_out=windows[:HELD_OUT],
            settings=settings,
            journal=Journal(),
        )
        seconds = time.process_time() - start
        kl, same = likeness(student, dense, asked)
        share = float((windows >= 0).float().mean())
        print(
            f"| {name} | {share:.0%} | {perplexity(student, validation, batch=8)} | {kl:.3f} | {same:.1%} | "
            f"{seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
