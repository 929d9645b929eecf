"""bfloat16 against float32 on a CPU: the same job in both, its plan, its losses and its processor time.

    make build/real/.ready
    python -m benchmarks.precision --model build/real/smollm2-135m-instruct --text build/real/brown.jsonl --out FOLDER

The jobs alternate, one after the other in processes of their own. Pairs are measured in float32, from their exported
checkpoints, on text that no stage has seen. Some twenty minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.whole_jobs import WholeJob
from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import PLAN, Plan
from pdtrim.contract.spec import JobSpec
from workers.inputs.models import load_model, load_tokenizer
from workers.pruning.model.calibration import split_stream, token_stream
from workers.pruning.model.measure import perplexity

PRECISIONS = ("float32", "bfloat16")
WINDOW_TOKENS, BATCH = 256, 4
STAGES = (StageName.SCORING, StageName.REMOVAL, StageName.DISTILLATION, StageName.EXPORT)


def measured(precision: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run the job in a precision. Returns what each stage took of the processor, and what came out."""
    documents = [json.loads(line)["text"] for line in args.text.read_text().splitlines()]
    spec = JobSpec.model_validate(
        {
            "model": {"source": f"file://{args.model.resolve()}"},
            "prefill": {"remove_blocks": args.removed},
            "decode": {"remove_blocks": args.removed},
            "calibration": {"windows": args.calibration_windows, "window_tokens": WINDOW_TOKENS},
            "search": {"algorithm": "greedy"},
            "distillation": {"heal_tokens": args.heal_tokens},
            "precision": precision,
            "seed": seed,
        }
    )
    folder = args.out / f"{precision}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    job, seconds = WholeJob(spec, args.model, documents, folder), {}
    for stage in STAGES:
        start = time.process_time()
        job.run((stage,))
        seconds[stage.value] = time.process_time() - start
    plan = Plan.model_validate_json((job.artifacts(StageName.REMOVAL) / PLAN).read_bytes())
    removal: Any = job.results[StageName.REMOVAL]
    healing: Any = job.results[StageName.DISTILLATION]
    stream = split_stream(token_stream(documents, load_tokenizer(args.model)), tokens=WINDOW_TOKENS)["validation"]
    held_out = stream[: args.windows * WINDOW_TOKENS].view(-1, WINDOW_TOKENS)
    model = load_model(job.artifacts(StageName.EXPORT) / "unified", dtype=torch.float32)
    shutil.rmtree(folder)
    return {
        "precision": precision,
        "seed": seed,
        "removed": sorted(plan.prefill.removed),
        "search_loss": removal.losses.prefill,
        "healing": [healing.prefill.before, healing.prefill.after],
        "perplexity": perplexity(model, held_out, batch=BATCH).value,
        "seconds": seconds,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: a row a job, and the ratios of time."""
    yield "| | seed | removed | loss in search | before healing, after | perplexity | search, s | healing, s |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        before, after = row["healing"]
        search, healing = (row["seconds"][stage] for stage in ("removal", "distillation"))
        yield (
            f"| {row['precision']} | {row['seed']} | {row['removed']} | {row['search_loss']:.4f} "
            f"| {before:.4f}, {after:.4f} | {row['perplexity']:.3f} | {search:.0f} | {healing:.0f} |"
        )
    for stage in ("removal", "distillation"):
        exact, rounded = (
            sum(row["seconds"][stage] for row in rows if row["precision"] == precision) for precision in PRECISIONS
        )
        yield f"\n{stage}: {rounded / exact:.2f} of float32's processor time"


def main() -> None:
    """Run the jobs, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="a JSON object with `text` a line")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--removed", type=int, default=3)
    parser.add_argument("--calibration-windows", type=int, default=8)
    parser.add_argument("--heal-tokens", type=int, default=32_768)
    parser.add_argument("--windows", type=int, default=80, help="held out, that the results are measured on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        for precision in PRECISIONS:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                rows.append(pool.submit(measured, precision, seed, args).result())
            print(json.dumps(rows[-1]), flush=True)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
