"""What README and docs/ show is run, as somebody would who follows them; the site builds; links lead somewhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from markdown.extensions.toc import slugify
from safetensors.torch import save_file
from transformers import LlamaConfig, MistralConfig, PretrainedConfig

from pdtrim.contract.jobs import StageName
from pdtrim.contract.spec import JobSpec
from service.settings import Settings
from tests.processes import pdtrim_up
from tests.receiver import receiving
from tests.tiny_job import write_tiny_model
from workers.pruning.model.checkpoint import SourceTensors, write_checkpoint
from workers.pruning.model.pair import FirstToken
from workers.pruning.model.plan import BlockPlan, kv_layer_map
from workers.pruning.serving.pair_server import PrefillDecodePair

ROOT = Path(__file__).parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
FIRST, LAST = [README, DOCS / "quick-start.md"], DOCS / "operations" / "security.md"
"""Others go on from the job of the quick start; once a key was made, the service asks for one."""
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]+) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
SERVICE, RUN, NOT_RUN = "the service that every block here talks to", "run", "not run: "
ADDRESS, HOOK = "http://127.0.0.1:8000", "https://ci.example.com/pdtrim"
# The README's job with everything small, so that the test is short.
SMALL = (
    '"calibration": {"windows": 4, "window_tokens": 64}, "search": {"evaluations": 30}, '
    '"distillation": {"heal_tokens": 4096}, "evaluation": {"windows": 4, "speed_tokens": 2, "speed_repeats": 1}}\''
)
# What a user has beside a checkpoint: transformers, and nothing of ours.
ALONE = """
import sys
assert "transformers" not in sys.modules or not {"service", "workers"} & sys.modules.keys()
"""
WHOLE = {"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 1}}


@dataclass(frozen=True)
class Block:
    """A fenced block and what the comment above it says of it."""

    document: Path
    line: int
    mark: str
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def documents() -> list[Path]:
    """In the order in which they are followed."""
    others = sorted(set(DOCS.rglob("*.md")) - {*FIRST, LAST})
    return [*FIRST, *others, LAST]


def blocks(document: Path) -> Iterator[Block]:
    text = document.read_text()
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        yield Block(document, line, match["mark"] or "", match["language"], match["code"])


COMMANDS = [
    block
    for document in documents()
    for block in blocks(document)
    if block.language in ("sh", "bash", "shell", "console", "python")
]


def script(document: Path) -> str:
    """The commands of a document as one program of the shell; before each block it says which one follows."""
    lines = []
    for block in (block for block in COMMANDS if block.document == document and block.mark == RUN):
        lines.append(f"echo '==> {block}'")
        program = f"'{sys.executable}' -P - <<'END OF PYTHON'\n{block.code}{ALONE}END OF PYTHON"
        lines.append(program if block.language == "python" else block.code)
    return "\n".join(lines)


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_a_command_block_is_run_or_says_why_not(block: Block) -> None:
    assert block.mark in (RUN, SERVICE) or block.mark.startswith(NOT_RUN)
    assert block.mark != SERVICE or block.code == ".venv/bin/pdtrim up\n"


# Two jobs on the reference model, and some twenty commands that take a second to start.
@pytest.mark.timeout(600)
def test_every_command_block_runs(environment: dict[str, str], tmp_path: Path) -> None:
    said: dict[Path, str] = {}
    environment["PDTRIM_WEBHOOK_ALLOWED_NETWORKS"] = '["127.0.0.0/8"]'
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    with receiving() as receiver, pdtrim_up(environment, tmp_path) as url:
        environment["PDTRIM_URL"] = url
        for document in documents():
            program = script(document).replace(ADDRESS, url).replace(HOOK, receiver.url)
            if document == README:
                assert program.count("2}}'") == 1
                program = program.replace("2}}'", f"2}}, {SMALL}")
            followed = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", program],
                env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280,
            )  # fmt: skip
            assert followed.returncode == 0, f"{document}: {followed.stdout[-2000:]}{followed.stderr[-2000:]}"
            said[document] = followed.stdout
        assert receiver.arrived.acquire(timeout=30)

    ran = {block for text in said.values() for block in re.findall(r"==> (\S+)$", text, re.MULTILINE)}
    assert ran == {str(block) for block in COMMANDS if block.mark == RUN}
    events = re.findall(r"^event: (.*)$", said[README], re.MULTILINE)
    assert events.count("stage.succeeded") == len(StageName)
    assert events[-1] == "job.succeeded"
    assert json.loads((tmp_path / "decode" / "config.json").read_text())["num_hidden_layers"] == 10
    assert "\ndef main(" in said[README]
    assert "\ndef main(" in said[DOCS / "guides" / "serving.md"]
    assert json.loads((tmp_path / "pruned" / "decode" / "config.json").read_text())["num_hidden_layers"] == 10
    assert json.loads((tmp_path / "lighter" / "unified" / "config.json").read_text())["num_hidden_layers"] == 11


SERVING = DOCS / "guides" / "serving.md"
PROMPTS = [list(range(10 * length, 11 * length)) for length in (2, 5, 7, 8, 9, 10, 20, 60)]
"""Token ids, of fewer tokens than the windowed pair's window of 8, and more."""
ANSWERED = f"""
halves = ("decode", "prefill")
print(json.dumps({{half: [answer(torch.tensor([p]), 12, half)[0].tolist() for p in {PROMPTS}] for half in halves}}))
"""
"""What is appended to the guide's program: its tokens after every prompt, by each half that may say the first."""
FAMILIES: dict[str, Callable[..., PretrainedConfig]] = {
    "full attention": LlamaConfig,
    "sliding windows": partial(MistralConfig, sliding_window=8),
}


def export_pair(source: Path, folder: Path) -> None:
    """Write the checkpoints of a pair whose decode gives up one block more."""
    plans = {"prefill": BlockPlan(5, frozenset({1})), "decode": BlockPlan(5, frozenset({1, 3}))}
    save_file({}, source / "untrained.safetensors")
    for role, plan in plans.items():
        write_checkpoint(
            source,
            folder / role,
            kept=plan.kept,
            overrides=SourceTensors.in_file(source / "untrained.safetensors"),
            pdtrim={"kv_layer_map": kv_layer_map(**plans), "serving": {"first_token": "decode"}},
            model_card="",
        )


@pytest.mark.training
@pytest.mark.parametrize("family", FAMILIES)
def test_the_program_of_the_serving_guide_gives_the_tokens_of_the_pair_server(family: str, tmp_path: Path) -> None:
    export_pair(write_tiny_model(tmp_path / "model", FAMILIES[family]), tmp_path / "pair")
    (program,) = (block for block in blocks(SERVING) if "kv_layer_map" in block.code and block.language == "python")
    ran = subprocess.run(
        [sys.executable, "-P", "-c", program.code + ANSWERED],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(ran.stdout.splitlines()[-1])

    pair = PrefillDecodePair.load(tmp_path / "pair" / "prefill", tmp_path / "pair" / "decode", dtype=torch.float32)
    assert pair.prefill_half.first_token == "decode"
    for first_token in get_args(FirstToken):
        served = replace(pair, prefill_half=replace(pair.prefill_half, first_token=first_token))
        expected = [served.decode(served.prefill(torch.tensor([prompt])), 12)[0].tolist() for prompt in PROMPTS]
        assert found[first_token] == expected
    assert found["decode"] != found["prefill"]


@pytest.mark.parametrize("document", [path for path in documents() if "```yaml" in path.read_text()], ids=str)
def test_yaml_is_part_of_a_job(document: Path) -> None:
    for block in blocks(document):
        if block.language == "yaml":
            JobSpec.model_validate(WHOLE | yaml.safe_load(block.code))


def anchors(document: Path) -> set[str]:
    return {slugify(heading, "-") for heading in re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)}


@pytest.mark.parametrize("document", [README, ROOT / "helm" / "pdtrim" / "README.md"], ids=str)
def test_relative_links_outside_of_the_site_lead_somewhere(document: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()) if not link.startswith("http")]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_site_builds_and_has_what_the_code_has(environment: dict[str, Any], tmp_path: Path) -> None:
    site = tmp_path / "site"
    # Not --quiet: warnings that are not shown do not count as such.
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
    assert {path.relative_to(DOCS).with_suffix(".html").as_posix() for path in documents() if path != README} < set(
        pages
    )
    for name, page in pages.items():
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=[\"']?(https?:)?//", page)
        assert not loaded, name
        assert "<!-- generated" not in page, name
    settings = {f"PDTRIM_{name.upper()}" for name in Settings.model_fields}
    assert {name for name in settings if f"<code>{name}</code>" not in pages["reference/settings.html"]} == set()
    for part in ("search.algorithm", "distillation.lora.rank", "evaluation.tasks.doc_to_text"):
        assert f"<code>{part}</code>" in pages["reference/job.html"]
    assert 'id="create_job"' in pages["reference/http.html"]
    assert 'id="pdtrim-webhooks-create"' in pages["reference/commands.html"]
    assert "frontier" in pages["measurements.html"] or "Published methods" in pages["measurements.html"]
