"""What reading a large text costs a job of default settings: a gigabyte of each form, its windows, time and memory."""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import zstandard
from pyarrow import parquet

from pdtrim.contract.spec import JobSpec
from service.settings import Settings
from service.sources import reference_model
from workers.inputs.models import load_tokenizer
from workers.inputs.sources import data_rows
from workers.inputs.windows import token_windows
from workers.pruning.model.calibration import stdlib_documents

MEGABYTE = 10**6
FORMS = ("a.txt", "a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet")


def write(path: Path, size: int) -> None:
    """The standard library's source, again and again, until there are `size` bytes of it before it is packed."""
    documents = list(stdlib_documents("train"))
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()
    times = -(-size // len(lines))
    if path.suffix == ".parquet":
        table = pa.table({"text": documents})
        with parquet.ParquetWriter(path, table.schema) as writer:
            for _ in range(times):
                writer.write_table(table)
        return
    with path.open("wb") as file:
        for part in _parts(path.name, documents, lines, times):
            file.write(part)


def _parts(name: str, documents: list[str], lines: bytes, times: int) -> Iterator[bytes]:
    if name == "a.json":
        yield b"[" + json.dumps({"text": "a"}).encode()
        part = "".join(",\n" + json.dumps({"text": document}) for document in documents).encode()
        yield from (part for _ in range(times))
        yield b"]"
        return
    text = "\n".join(documents).encode()
    packed = {"a.txt": lambda: text, "a.jsonl.gz": lambda: gzip.compress(lines, 1)}
    packed |= {"a.jsonl.zst": lambda: zstandard.compress(lines), "a.jsonl": lambda: lines}
    part = packed[name]()
    yield from (part for _ in range(times))


def read(path: Path) -> str:
    """A row of the table; of a process of its own, as memory is counted by its highest level."""
    halves = {half: {"remove_blocks": 1} for half in ("prefill", "decode")}
    spec = JobSpec.model_validate({"model": "reference", **halves, "data": {"source": path.as_uri()}})
    settings = Settings(data_dir=path.parent / "data", allowed_sources=[path.parent.as_uri()])
    tokenizer = load_tokenizer(reference_model())
    before, start = _peak_megabytes(), time.process_time()
    windows = token_windows(spec, data_rows(spec, settings), tokenizer)
    seconds, more = time.process_time() - start, _peak_megabytes() - before
    tokens = sum(part.numel() for part in windows.ids.values())
    return f"| `{path.name}` | {path.stat().st_size / MEGABYTE:.0f} MB | {tokens:,} | {seconds:.2f} s | {more:.0f} MB |"


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--file", type=Path, help="read this one alone")
    args = parser.parse_args()
    if args.file is not None:
        print(read(args.file))
        return
    print("| file | size | tokens that the job asks for | processor time | memory above the tokenizer's |")
    print("|---|---|---|---|---|", flush=True)
    for name in FORMS:
        with TemporaryDirectory() as folder:
            write(Path(folder) / name, args.megabytes * MEGABYTE)
            subprocess.run([sys.executable, "-m", "benchmarks.reading", "--file", f"{folder}/{name}"], check=True)


if __name__ == "__main__":
    main()
