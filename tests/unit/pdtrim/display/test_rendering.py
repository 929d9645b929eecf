from __future__ import annotations

from io import StringIO

from rich.console import Console

from pdtrim.contract.results import Bounds, ModelFigures, PairFigures, Spread
from pdtrim.display.rendering import evaluation_report, search_report
from tests.found import evaluation, model_figures, pair_figures, removal, token_rule_figures

DENSE = model_figures(blocks=12)
DECODE = model_figures(
    blocks=8, kl_to_dense=0.125, top1_agreement=0.875, time_to_first_token_ms=20.0, inter_token_latency_ms=4.0
)
PAIR = pair_figures()
REMOVAL = removal(
    prefill={"num_blocks": 48, "deleted": [20, 21], "distilled": {"30": 31}},
    decode={"num_blocks": 48, "deleted": list(range(20, 34)), "distilled": {"40": 41}},
    losses={
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
    bounds={
        half: {
            "max_perplexity_increase": most,
            "perplexity_increase": increase,
            "met": increase < most,
            "dense_perplexity": 20.0,
            "frontier": [],
        }
        for half, most, increase in (("prefill", 0.05, 0.031), ("decode", 0.1, 0.2))
    },
    sensitivity={
        "dense": {"both": 2.0, "decode_only": 1.0},
        "blocks": [{"block": block, "both": 2.125 + block, "decode_only": 1.0625} for block in range(47)],
    },
)


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
    assert "prefill: greedy 12 sets, annealing 36 sets, ended by its budget" in words
    assert "decode: greedy 9 sets" in words
    for block in range(47):
        assert f" {block} {block + 0.125:.4f} 0.0625" in f" {words}"


def test_a_search_without_bounds_shows_none() -> None:
    page = StringIO()
    Console(width=80, file=page).print(search_report(REMOVAL.model_copy(update={"bounds": Bounds()})))
    assert "Perplexity without" not in page.getvalue()


def test_a_search_of_a_version_that_recorded_no_effort_is_shown_without_one() -> None:
    page = StringIO()
    Console(width=80, file=page).print(search_report(REMOVAL.model_copy(update={"effort": None})))
    assert "Search for" not in page.getvalue()


def shown(models: dict[str, ModelFigures], pair: PairFigures) -> dict[str, str]:
    """Each row's cells by its label, as a terminal shows them."""
    page = StringIO()
    Console(width=160, file=page).print(evaluation_report(evaluation(models=models, pair=pair)))
    lines = [line.strip().split("  ", 1) for line in page.getvalue().splitlines()]
    return {line[0]: " ".join(line[1].split()) for line in lines if len(line) == 2}


def test_likeness_and_latency_are_shown_beside_the_dense_model() -> None:
    rows = shown({"dense": DENSE, "decode": DECODE}, PAIR)
    assert rows["KL to dense, nats"] == "0.1250"
    assert rows["same top token"] == "87.5%"
    assert rows["first token, ms"] == "30.0 20.0 (1.50×)"
    assert rows["each next token, ms"] == "6.0 4.0 (1.50×)"


def test_peak_memory_is_shown_where_it_was_measured() -> None:
    measured = {
        name: model.model_copy(update={"peak_memory_bytes": 3 << 20})
        for name, model in (("dense", DENSE), ("decode", DECODE))
    }
    assert "peak memory" not in shown({"dense": DENSE, "decode": DECODE}, PAIR)
    assert shown(measured, PAIR)["peak memory"] == "3 MiB 3 MiB"


def test_a_token_rule_is_shown_with_what_it_saves_and_costs() -> None:
    models = {"dense": DENSE, "decode": DECODE}
    assert "KV sent with the token rule" not in shown(models, PAIR)
    rows = shown(models, pair_figures(kv_tokens=token_rule_figures()))
    assert rows["KV sent with the token rule"] == "4 KiB 1 KiB (4.00× less)"
    assert rows["PD loss with the token rule"] == "3.2500"
    short = token_rule_figures(ratio_asked=9.0, ratio_reached=False)
    rows = shown(models, pair_figures(kv_tokens=short))
    assert rows["KV sent with the token rule"] == "4 KiB 1 KiB (4.00× less; 9× asked for)"


def test_the_first_token_is_shown_by_both_halves_and_the_one_that_is_served_is_marked() -> None:
    models = {"dense": DENSE, "decode": DECODE}
    rows = shown(models, pair_figures())
    assert rows["→ first token by decode, nats"] == "2.0000 2.7500 2.2500"
    assert rows["first token by prefill, nats"] == "2.0000 2.5000 2.1250"
    rows = shown(models, pair_figures(first_token="prefill"))
    assert rows["first token by decode, nats"] == "2.0000 2.7500 2.2500"
    assert rows["→ first token by prefill, nats"] == "2.0000 2.5000 2.1250"
    earlier = pair_figures(first_token_losses=None)
    assert not any("first token by" in label for label in shown(models, earlier))


def test_mlp_channels_are_shown_where_they_differ() -> None:
    dense, slim = (model_figures(mlp_channels=channels) for channels in (1536, 768))
    assert "MLP channels" not in shown({"dense": DENSE, "decode": DECODE}, PAIR)
    assert "MLP channels" not in shown({"dense": dense, "decode": dense}, PAIR)
    assert shown({"dense": dense, "decode": slim}, PAIR)["MLP channels"] == "1,536 768"


def test_tasks_are_shown_with_their_standard_errors() -> None:
    tasks = {
        "sums": {
            "dense": {"acc": {"value": 0.75, "stderr": 0.0125}, "f1": {"value": 0.5, "stderr": None}},
            "decode": {"acc": {"value": 0.5, "stderr": 0.025}, "f1": {"value": None, "stderr": None}},
        }
    }
    page = StringIO()
    models = {"dense": DENSE, "decode": DECODE}
    Console(width=80, file=page).print(evaluation_report(evaluation(models=models)))
    assert "Tasks" not in page.getvalue()
    Console(width=80, file=page).print(evaluation_report(evaluation(models=models, tasks=tasks)))
    lines = [" ".join(line.split()) for line in page.getvalue().splitlines()]
    assert "sums acc 0.750 ± 0.013 0.500 ± 0.025" in lines or "sums acc 0.750 ± 0.012 0.500 ± 0.025" in lines
    assert "sums f1 0.500 none" in lines


def test_the_pair_that_was_asked_stands_beside_its_halves() -> None:
    tasks = {
        "sums": {
            name: {"acc": {"value": value, "stderr": None}}
            for name, value in (("dense", 0.75), ("decode", 0.5), ("pair", 0.625))
        }
    }
    page = StringIO()
    models = {"dense": DENSE, "decode": DECODE}
    Console(width=80, file=page).print(evaluation_report(evaluation(models=models, tasks=tasks)))
    assert "sums acc 0.750 0.500 0.625" in [" ".join(line.split()) for line in page.getvalue().splitlines()]


def test_samples_stand_beside_each_other_below_the_end_of_their_prompt() -> None:
    prompt = "x = 1\n" * 60 + "def f(x):"
    sample = {"prompt": prompt, "continuations": {"dense": " return x\n", "pair": " pass [bold]"}}
    page = StringIO()
    Console(width=80, file=page).print(evaluation_report(evaluation(samples=[sample])))
    lines = [line.rstrip() for line in page.getvalue().splitlines()]
    assert lines.count("x = 1") == 38
    assert any(line.startswith("…") for line in lines)
    assert "def f(x):" in lines
    assert "dense pair" in [" ".join(line.split()) for line in lines]
    assert "return x pass [bold]" in [" ".join(line.split()) for line in lines]


def test_speeds_are_shown_with_their_spread_and_a_single_repeat_as_such() -> None:
    def repeated(model: ModelFigures, repeats: int) -> ModelFigures:
        ms = model.time_to_first_token_ms
        assert ms is not None
        spread = Spread(low=ms - 1, high=ms + 2)
        return model.model_copy(update={"speed_repeats": repeats, "time_to_first_token_spread_ms": spread})

    rows = shown({name: repeated(one, 5) for name, one in (("dense", DENSE), ("decode", DECODE))}, PAIR)
    assert rows["first token, ms, median of 5"] == "30.0 20.0 (1.50×)"
    assert rows["first token, ms, least to greatest"] == "29.0 to 32.0 19.0 to 22.0"
    rows = shown({name: repeated(one, 1) for name, one in (("dense", DENSE), ("decode", DECODE))}, PAIR)
    assert rows["first token, ms, measured once"] == "30.0 20.0 (1.50×)"
    assert not any("least to greatest" in label for label in rows)
