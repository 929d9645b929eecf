"""What a job says that its pair can answer, held against a loop that knows transformers and `pdtrim.json` alone."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from pdtrim.client import Client
from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import EvaluationResult
from service.commands.demo_job import BRACKETS, GETTERS
from tests.processes import pdtrim_up

NAMED = "arc_easy"
"""A task of lm-evaluation-harness, whose data set lies in the folder that the worker runs in."""
ARC: list[dict[str, Any]] = [
    {
        "id": str(number),
        "question": f"{code}, of which the last bracket is closed by",
        "choices": {"label": ["A", "B", "C"], "text": [")", "]", "}"]},
        "answerKey": "ABC"[")]}".index(bracket)],
    }
    for number, (code, bracket) in enumerate((doc["code"], doc["bracket"]) for doc in BRACKETS["docs"])
]


class Pair:
    """Two checkpoints of a job, as anybody would serve them by hand."""

    def __init__(self, folder: Path) -> None:
        halves = (folder / "prefill", folder / "decode")
        self.prefill, self.decode = (AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32) for half in halves)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "decode")
        pdtrim = json.loads((folder / "decode" / "pdtrim.json").read_text())
        self.layer_map, self.first_token = pdtrim["kv_layer_map"], pdtrim["serving"]["first_token"]

    @torch.no_grad()
    def logits(self, prompt: list[int], answer: list[int]) -> Tensor:
        """For each token of the answer, and for the one after it."""
        by_decode = self.first_token == "decode"
        read, cache = (prompt[:-1] if by_decode else prompt), DynamicCache(config=self.prefill.config)
        first: Tensor = self.prefill(input_ids=torch.tensor([read]), past_key_values=cache).logits[0, -1:]
        handed = DynamicCache(config=self.decode.config)
        for layer, source in enumerate(self.layer_map):
            handed.update(cache.layers[source].keys, cache.layers[source].values, layer)
        ids = [*prompt[-1:], *answer] if by_decode else answer
        if not ids:
            return first
        others: Tensor = self.decode(input_ids=torch.tensor([ids]), past_key_values=handed).logits[0]
        return others if by_decode else torch.cat([first, others])

    def likelihood(self, text: str, answer: str) -> float:
        """Of the answer after the text, in nats."""
        prompt, whole = (self.tokenizer(given)["input_ids"] for given in (text, text + answer))
        said = whole[len(prompt) :]
        chances = self.logits(prompt, said)[: len(said)].log_softmax(-1)
        return float(chances.gather(1, torch.tensor(said)[:, None]).sum())

    def answer(self, text: str, until: list[str], most_tokens: int) -> str:
        """What follows the text."""
        prompt: list[int] = self.tokenizer(text)["input_ids"]
        said: list[int] = []
        while len(said) < most_tokens and (not said or said[-1] != self.tokenizer.eos_token_id):
            said.append(int(self.logits(prompt, said)[-1].argmax()))
        text = str(self.tokenizer.decode(said, skip_special_tokens=True))
        for stop in until:
            text = text.split(stop)[0]
        return text.strip()

    def chosen(self, text: str, delimiter: str, choices: list[str]) -> int:
        """The place of the likeliest of the choices."""
        return max(range(len(choices)), key=lambda place: self.likelihood(text, delimiter + choices[place]))


def finished(client: Client, spec: dict[str, Any], to: Path) -> EvaluationResult:
    """What the job's evaluation found, its checkpoints in a folder."""
    job = client.wait(client.create(spec).id)
    for artifact in client.artifacts(job.id):
        if artifact.stage == StageName.EXPORT:
            client.download(job.id, artifact, to / artifact.name)
    found = job.result(EvaluationResult)
    assert found is not None
    return found


def test_a_pair_answers_as_a_loop_written_with_transformers_alone(environment: dict[str, str], tmp_path: Path) -> None:
    harness = find_spec("lm_eval") is not None
    tasks = [BRACKETS, GETTERS, *([NAMED] if harness else [])]
    prompt = "def read_lines(path):\n"
    spec = {
        "model": "reference",
        "prefill": {"remove_blocks": 1},
        "decode": {"remove_blocks": 3},
        "calibration": {"windows": 4, "window_tokens": 64},
        "search": {"algorithm": "greedy"},
        "distillation": {"enabled": False},
        "evaluation": {
            "windows": 4,
            "speed_tokens": 2,
            "speed_repeats": 1,
            "tasks": tasks,
            "prompts": [prompt],
            "sample_tokens": 12,
        },
    }
    data = tmp_path / "allenai" / "ai2_arc"
    data.mkdir(parents=True)
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ARC))
    splits = "".join(f"  - {{split: {split}, path: test.jsonl}}\n" for split in ("train", "validation", "test"))
    (data / "README.md").write_text(f"---\nconfigs:\n- config_name: ARC-Easy\n  data_files:\n{splits}---\n")
    environment |= {"PDTRIM_ALLOWED_SOURCES": '["reference", "builtin:", "hf://"]', "HF_HUB_OFFLINE": "1"}

    with pdtrim_up(environment, tmp_path) as url, Client(url) as client:
        jobs = {
            first_token: finished(client, spec | {"serving": {"first_token": first_token}}, tmp_path / first_token)
            for first_token in ("decode", "prefill")
        }

    for first_token, found in jobs.items():
        pair = Pair(tmp_path / first_token)
        assert pair.first_token == first_token
        closed = [
            BRACKETS["doc_to_choice"][pair.chosen(doc["code"], "", BRACKETS["doc_to_choice"])] == doc["bracket"]
            for doc in BRACKETS["docs"]
        ]
        got = [
            pair.answer(f"def get_{doc['name']}(self):\n    return self.", GETTERS["generation_kwargs"]["until"], 4)
            == doc["name"]
            for doc in GETTERS["docs"]
        ]
        expected = {"bracket": ("acc", closed), "getter": ("exact_match", got)}
        if harness:
            by_name = [
                pair.chosen(f"Question: {row['question']}\nAnswer:", " ", row["choices"]["text"])
                == "ABC".index(row["answerKey"])
                for row in ARC
            ]
            expected[NAMED] = ("acc", by_name)
        for task, (metric, right) in expected.items():
            assert found.tasks[task].keys() == {"dense", "prefill", "decode", "pair"}
            assert found.tasks[task]["pair"][metric].value == pytest.approx(sum(right) / len(right)), task
        # Else the pair would be told from none of its halves.
        values = {
            name: [found.tasks[task][name][metric].value for task, (metric, _) in expected.items()]
            for name in ("dense", "prefill", "decode", "pair")
        }
        assert values["pair"] not in (values["dense"], values["decode"])
        (sample,) = found.samples
        assert sample.continuations["pair"].strip() == pair.answer(prompt, [], 12)
