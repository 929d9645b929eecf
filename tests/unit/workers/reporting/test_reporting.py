"""The report and the model cards, from figures that no job had."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdtrim.contract.results import BlockScores, ModelFigures, SearchRecord
from pdtrim.contract.spec import JobSpec
from tests.found import evaluation, model_figures, pair_figures, plan, token_rule_figures
from workers.reporting.card import inherited_metadata, model_card
from workers.reporting.figures import DARK, INK, PLOTS, Drawing, Palette, draw_all
from workers.reporting.findings import Findings
from workers.reporting.page import render

BLOCKS = 70
VOID = {"img", "meta"}


def measured(blocks: int, perplexity: float, **changes: Any) -> ModelFigures:
    figures = {
        "blocks": blocks,
        "kept_blocks": list(range(blocks)),
        "deleted_blocks": [3],
        "distilled_blocks": {"5": 6},
        "perplexity": {"value": perplexity, "standard_error": 0.25},
        "undistilled_perplexity": {"value": perplexity + 1, "standard_error": 0.25},
        "kl_to_dense": 0.125,
        "top1_agreement": 0.875,
        "parameters": blocks * 1000,
        "bytes": blocks * 2000,
        "time_to_first_token_ms": 0.5 * blocks,
        "inter_token_latency_ms": 0.25 * blocks,
    }
    return model_figures(**figures | changes)


@pytest.fixture(scope="module")
def findings() -> Findings:
    """A deep model that prefill leaves as it is, so that nothing was searched for it, and that has what few jobs ask
    for."""
    losses = {"decode_set_in_both": 0.75, "decode_only": 0.25, "non_nested": 0.4, "non_nested_removed": [1, 2, 4, 9]}
    bound = {
        "max_perplexity_increase": 0.1, "perplexity_increase": 0.2, "met": False, "dense_perplexity": 12.0,
        "frontier": [],
    }  # fmt: skip
    chosen = plan(
        prefill={"num_blocks": BLOCKS, "deleted": [], "distilled": {}},
        decode={"num_blocks": BLOCKS, "deleted": [3, 40], "distilled": {"5": 6, "8": 7}},
        losses={"objective": "kl", "prefill": 0.0, "decode": 0.5, "controls": losses},
        bounds={"decode": bound},
        sensitivity={
            "dense": {"both": 0.0, "decode_only": 0.0},
            "blocks": [{"block": block, "both": 0.5, "decode_only": 0.25} for block in range(BLOCKS)],
        },
        kv_layer_map=[0, 1, 2, 4],
        frontier={
            "prefill": [{"remove_blocks": 0, "removed": [], "loss": 0.0}],
            "decode": [{"remove_blocks": 4, "removed": [3, 5, 8, 40], "loss": 0.5}],
        },
    )
    search = {
        "prefill": [{"removed": [], "loss": 0.0}],
        "decode": [{"removed": [3, 5, 8, 41], "loss": 0.9}, {"removed": [3, 5, 8, 40], "loss": 0.5}],
    }
    ended = [{"share": 0.8, "loss": 0.4, "blocks": [7], "parts": {9: "mlp"}}]
    budget = {"half": "decode", "cost": "weight_bytes", "dense": 1000, "asked": 0.75, "share": 0.8, "met": False}
    walk = {"kinds": ["block", "mlp"], "steps": ended, "met": False}
    search = {**search, "budgets": [{**budget, "sets": 12, "walks": [walk]}]}
    models = {"decode": measured(66, 14.0), "dense": measured(70, 12.0, undistilled_perplexity=None),
              "prefill": measured(70, 12.0, undistilled_perplexity=None)}  # fmt: skip
    tasks = {"sums": {name: {"acc": {"value": 0.625, "stderr": 0.01}} for name in (*models, "pair")}}
    tasks["sums"]["pair"]["acc"]["value"] = 0.5
    sample = {"prompt": "def f(x):", "continuations": {"dense": "\n    return <b>x", "pair": " pass"}}
    spec = {"model": "hf://acme/big", "prefill": {"remove_blocks": 0}, "decode": {"remove_blocks": 4}}
    return Findings(
        job_id="job_1",
        spec=JobSpec.model_validate({**spec, "metadata": {"note": "<script>alert(1)</script>"}}),
        model_revision="0123456789abcdef",
        scores=BlockScores(cosine=[1.0, -0.1, *[0.9] * (BLOCKS - 2)], merge_errors=[]),
        plan=chosen,
        search=SearchRecord.model_validate(search),
        evaluation=evaluation(
            models=models, pair=pair_figures(kv_tokens=token_rule_figures()), tasks=tasks, samples=[sample]
        ),
        versions={"torch": "2"},
    )


@pytest.fixture(scope="module")
def drawings(findings: Findings) -> list[Drawing]:
    """Drawn once: it takes seconds."""
    return list(draw_all(findings))


class Reader(HTMLParser):
    """What is on a page: its text, what it names elsewhere, its images' descriptions; elements that are not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.named: list[str] = []
        self.described: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.open += [] if tag in VOID else [tag]
        self.named += [given[name] or "" for name in ("src", "href", "srcset", "data", "action") if name in given]
        self.described += [alt] if tag == "img" and (alt := given.get("alt")) else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.slow
def test_the_report_holds_every_figure_and_number_and_asks_for_nothing_else(
    findings: Findings, drawings: list[Drawing]
) -> None:
    page = Reader(render(findings, drawings))

    assert page.open == []
    assert "script" not in page.tags - {"style"}
    assert "<script>alert(1)" in page.text
    assert len(page.named) == len(page.described) == len(PLOTS)
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.named)
    for number in ("12.00 ± 0.25", "14.00 ± 0.25", "15.00 ± 0.25", "0.7500", "1 KiB (4.00× less)", "0.625 ± 0.010"):
        assert number in page.text
    assert "0.500 ± 0.010" in page.text
    assert all(text in page.text for text in ("def f(x):", "\n    return <b>x", " pass"))
    assert "Budget of decode: 80.0% of 1,000 weight bytes left, asked for 75.0%; no set found keeps it" in page.text
    assert "Perplexity without what decode gives up: +20.0% (bound +10.0%, not kept by any set)" in page.text
    assert "decode gives up 3, 5, 8, 40 of 70 blocks" in " ".join(page.described)
    for drawing in drawings:
        assert drawing.png.startswith(b"\x89PNG")
        assert set(re.findall(r"""(?:href="|url\()([^#][^")]*)""", drawing.svg)) == set()
        assert not re.findall("|".join(vars(INK).values()), drawing.svg.partition("</style>")[2])


@pytest.mark.slow
def test_the_same_findings_give_the_same_bytes(findings: Findings) -> None:
    unified = {name: measured(66, 14.0) for name in ("dense", "unified")}
    job = replace(findings, evaluation=evaluation(models=unified))

    drawings = list(draw_all(job))
    assert drawings == list(draw_all(job))
    assert "kv_layer_map[k]" not in render(job, drawings)


@pytest.mark.parametrize("palette", [INK, DARK])
def test_text_stands_out_from_what_is_behind_it(palette: Palette) -> None:
    behind = {"paper": ("ink", "muted", "prefill", "decode", "distilled"), "gone": ("ink",)}
    for ground, texts in behind.items():
        for text in texts:
            assert contrast(getattr(palette, text), getattr(palette, ground)) >= 4.5, (text, ground)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2.2."""
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


PDTRIM: dict[str, Any] = {
    "role": "decode",
    "source": {"uri": "hf://acme/big", "revision": "abc"},
    "num_source_blocks": 4,
    "kept_blocks": [0, 2],
    "distilled_blocks": {"1": 0},
    "mlp_width": 0.5,
    "kv_tokens": {"layers": [1], "first": 4, "last": 8},
    "serving": {"first_token": "decode"},
}


def test_a_card_carries_the_source_its_licence_and_the_numbers(tmp_path: Path, findings: Findings) -> None:
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: acme\nlanguage: [en]\ntags: [chat]\nmodel-index: 1\n---\n# Big\n"
    )
    card = model_card(PDTRIM, inherited_metadata(tmp_path), findings.evaluation_tables())

    _, metadata, text = card.split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "base_model": "acme/big", "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["pruned", "pdtrim", "decode"], "license": "other", "license_name": "acme", "language": ["en"],
    }  # fmt: skip
    for told in (
        "# acme/big, decode checkpoint",
        "removed blocks (indices of the dense model): 1, 3",
        "block 1 was distilled into block 0",
        "MLP channels: 0.5 of",
        "first 4 and the last 8 tokens",
        "Decode runs the prompt's last token itself",
        "| perplexity | 12.00 ± 0.25 | 12.00 ± 0.25 | 14.00 ± 0.25 |",
        "| sums acc |",
    ):
        assert told in text


@pytest.mark.parametrize("recorded", [{}, {"serving": {"first_token": "prefill"}}], ids=["earlier", "now"])
def test_a_card_says_where_prefill_says_the_first_token(recorded: dict[str, Any]) -> None:
    described = {key: value for key, value in PDTRIM.items() if key != "serving"} | recorded
    assert "Prefill says the first generated token." in model_card(described, {})


def test_a_card_says_which_runtime_leaves_out_what_blocks_give_up() -> None:
    assert "pdtrim-vllm" not in model_card(PDTRIM, {})
    card = model_card({**PDTRIM, "dead_units": {"3": "kv_only"}}, {})
    assert "block 3 gives up all but the keys and values" in card
    assert "vLLM with `pdtrim-vllm`" in card


def test_a_card_and_the_report_say_what_prompts_begin_with(findings: Findings, drawings: list[Drawing]) -> None:
    assert "begins a text" not in model_card(PDTRIM, {}) + render(findings, drawings)
    assert "begins a text with `<bos>`" in model_card({**PDTRIM, "opening": ["<bos>"]}, {})
    scores = findings.scores.model_copy(update={"opening": ["<bos>"]})
    page = Reader(render(replace(findings, scores=scores), drawings))
    assert "Every window begins with <bos>, as the model's tokenizer begins a text." in page.text


@pytest.mark.parametrize("text", ["", "---\nlicense: [\n---\n", "---\nlicense: {a: 1}\n---\n", "---\n- license\n---\n"])
def test_a_card_that_tells_no_licence_passes_none_on(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)

    assert inherited_metadata(tmp_path) == {}
    assert "base_model" not in model_card({**PDTRIM, "source": {"uri": "s3://bucket/model"}}, {})
