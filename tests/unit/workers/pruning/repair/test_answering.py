from __future__ import annotations

from pathlib import Path

import torch

from tests.tiny_job import write_tiny_model
from tests.unit.workers.pruning.models import loaded_whole, random_ids, tiny_model
from workers.pruning.model.streaming import load_streamed
from workers.pruning.repair.answering import answers

PROMPTS = [random_ids(1, length)[0].tolist() for length in (3, 9, 5)]


def test_answers_follow_from_the_seed_and_no_other_random_number_does() -> None:
    model, before = tiny_model("llama"), torch.random.get_rng_state()
    first, again, other = (answers(model, PROMPTS, most_tokens=6, ends=[], seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert [len(answer) for answer in first] == [6, 6, 6]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_answer_is_no_other_in_a_batch_of_longer_prompts() -> None:
    model = tiny_model("llama")
    for parameter in model.get_output_embeddings().parameters():
        parameter.data.mul_(1e4)  # One word has all the probability.
    alone = [answers(model, [prompt], most_tokens=6, ends=[], seed=1)[0] for prompt in PROMPTS]
    assert answers(model, PROMPTS, most_tokens=6, ends=[], seed=1) == alone


def test_an_answer_ends_with_what_ends_it() -> None:
    model = tiny_model("llama")
    whole = answers(model, PROMPTS, most_tokens=8, ends=[], seed=3)
    end = whole[0][2]
    ended = answers(model, PROMPTS, most_tokens=8, ends=[end], seed=3)
    assert ended[0] == whole[0][: whole[0].index(end) + 1]
    assert all(answer.count(end) <= 1 and (end not in answer or answer[-1] == end) for answer in ended)


def test_a_model_that_is_read_block_by_block_answers_the_same(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    streamed, _ = load_streamed(folder, dtype=torch.float32, device=torch.device("cpu"))
    first, second = (
        answers(model, PROMPTS, most_tokens=4, ends=[], seed=1) for model in (streamed, loaded_whole(folder))
    )
    assert first == second
