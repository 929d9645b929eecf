from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console

from pdtrim.display.rendering import report, search_report

DENSE: dict[str, Any] = {
    "blocks": 12,
    "deleted_blocks": [],
    "distilled_blocks": {},
    "undistilled_perplexity": None,
    "perplexity": {"value": 20.0, "standard_error": 1.0},
    "kl_to_dense": 0.0,
    "top1_agreement": 1.0,
    "parameters": 1000,
    "bytes": 1 << 20,
    "time_to_first_token_ms": 30.0,
    "inter_token_latency_ms": 6.0,
    "decode_tokens_per_second": 150.0,
    "peak_memory_bytes": None,
}
DECODE = {
    **DENSE,
    "blocks": 8,
    "kl_to_dense": 0.125,
    "top1_agreement": 0.875,
    "time_to_first_token_ms": 20.0,
    "inter_token_latency_ms": 4.0,
}
RULE = {"loss": 3.25, "bytes_sent": 1024, "ratio": 4.0, "ratio_asked": 4.0, "ratio_reached": True}
PAIR: dict[str, Any] = {
    "prompt_tokens": 128,
    "continuation_tokens": 128,
    "dense_loss": 3.0,
    "pruned_loss": 3.5,
    "distilled_loss": 3.2,
    "kv_tokens": None,
    "kv_bytes_per_request": {"tokens": 256, "dense": 8192, "pruned": 4096, "dense_sent": 4096, "sent": 2048},
}


REMOVAL: dict[str, Any] = {
    "prefill": {"num_blocks": 48, "deleted": [20, 21], "distilled": {"30": 31}},
    "decode": {"num_blocks": 48, "deleted": list(range(20, 34)), "distilled": {"40": 41}},
    "losses": {
        "objective": "cross_entropy",
        "prefill": 2.0,
        "decode": 2.5,
        "controls": {
            "decode_set_in_both": 2.75,
            "decode_only": 2.25,
            "non_nested": 2.4,
            "non_nested_removed": list(range(30, 45)),
        },
    },
    "bounds": {
        "prefill": {"max_perplexity_increase": 0.05, "perplexity_increase": 0.031, "met": True},
        "decode": {"max_perplexity_increase": 0.1, "perplexity_increase": 0.2, "met": False},
    },
    "sensitivity": {
        "dense": {"both": 2.0, "decode_only": 1.0},
        "blocks": [{"block": block, "both": 2.125 + block, "decode_only": 1.0625} for block in range(47)],
    },
}


def test_the_search_is_shown_with_its_controls_bounds_and_every_block_in_eighty_columns() -> None:
    page = StringIO()
    Console(width=80, file=page).print(search_report(REMOVAL))
    text = page.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    words = " ".join(text.split())
    assert "the pair 20, 21, 30 " in words
    assert "decode only none " in words
    assert [words.count(f" {loss}") for loss in ("2.5000", "2.7500", "2.2500", "2.4000")] == [1, 1, 1, 1]
    assert "prefill gives up: +3.1% (bound +5.0%)" in words
    assert "decode gives up: +20.0% (bound +10.0%, not kept by any set)" in words
    for block in range(47):
        assert f" {block} {block + 0.125:.4f} 0.0625" in f" {words}"


def test_a_search_without_bounds_shows_none() -> None:
    page = StringIO()
    Console(width=80, file=page).print(search_report({**REMOVAL, "bounds": {"prefill": None, "decode": None}}))
    assert "Perplexity without" not in page.getvalue()


def shown(models: dict[str, Any], pair: dict[str, Any]) -> dict[str, str]:
    """Each row's cells by its label, as a terminal shows them."""
    page = StringIO()
    Console(width=160, file=page).print(report({"models": models, "pair": pair}))
    lines = [line.strip().split("  ", 1) for line in page.getvalue().splitlines()]
    return {line[0]: " ".join(line[1].split()) for line in lines if len(line) == 2}


def test_likeness_and_latency_are_shown_beside_the_dense_model() -> None:
    rows = shown({"dense": DENSE, "decode": DECODE}, PAIR)
    assert rows["KL to dense, nats"] == "0.1250"
    assert rows["same top token"] == "87.5%"
    assert rows["first token ms"] == "30.0 20.0 (1.50×)"
    assert rows["each next token ms"] == "6.0 4.0 (1.50×)"


def test_peak_memory_is_shown_where_it_was_measured() -> None:
    measured = {name: {**model, "peak_memory_bytes": 3 << 20} for name, model in (("dense", DENSE), ("decode", DECODE))}
    assert "peak memory MiB" not in shown({"dense": DENSE, "decode": DECODE}, PAIR)
    assert shown(measured, PAIR)["peak memory MiB"] == "3.0 3.0"


def test_a_token_rule_is_shown_with_what_it_saves_and_costs() -> None:
    models = {"dense": DENSE, "decode": DECODE}
    assert "KV sent with the token rule" not in shown(models, PAIR)
    rows = shown(models, {**PAIR, "kv_tokens": RULE})
    assert rows["KV sent with the token rule"] == "4 KiB 1 KiB (4.00× less)"
    assert rows["PD loss with the token rule"] == "3.2500"
    short = {**RULE, "ratio_asked": 9.0, "ratio_reached": False}
    rows = shown(models, {**PAIR, "kv_tokens": short})
    assert rows["KV sent with the token rule"] == "4 KiB 1 KiB (4.00× less; 9× asked for)"


def test_mlp_channels_are_shown_where_they_differ() -> None:
    dense, slim = {**DENSE, "mlp_channels": 1536}, {**DECODE, "mlp_channels": 768}
    assert "MLP channels" not in shown({"dense": DENSE, "decode": DECODE}, PAIR)
    assert "MLP channels" not in shown({"dense": dense, "decode": {**DECODE, "mlp_channels": 1536}}, PAIR)
    assert shown({"dense": dense, "decode": slim}, PAIR)["MLP channels"] == "1,536 768"


def test_tasks_are_shown_with_their_standard_errors() -> None:
    tasks = {
        "sums": {
            "dense": {"acc": {"value": 0.75, "stderr": 0.0125}, "f1": {"value": 0.5, "stderr": None}},
            "decode": {"acc": {"value": 0.5, "stderr": 0.025}, "f1": {"value": None, "stderr": None}},
        }
    }
    page = StringIO()
    evaluation = {"models": {"dense": DENSE, "decode": DECODE}, "pair": PAIR}
    Console(width=80, file=page).print(report(evaluation))
    assert "Tasks" not in page.getvalue()
    Console(width=80, file=page).print(report({**evaluation, "tasks": tasks}))
    lines = [" ".join(line.split()) for line in page.getvalue().splitlines()]
    assert "sums acc 0.750 ± 0.013 0.500 ± 0.025" in lines or "sums acc 0.750 ± 0.012 0.500 ± 0.025" in lines
    assert "sums f1 0.500 none" in lines
