"""What the README shows is run; what it lists is compared with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from service.contract.jobs import StageName
from service.settings import Settings
from tests.processes import pdtrim_up

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# The walk-through's job with everything small, so that the test is short.
SMALL = (
    '"calibration": {"windows": 4, "window_tokens": 64}, "search": {"evaluations": 30}, '
    '"distillation": {"heal_tokens": 4096}, "evaluation": {"windows": 4, "speed_tokens": 2, "speed_repeats": 1}}\''
)


def block_after(marker: str) -> str:
    match = re.search(rf"<!-- {marker}: .*?-->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert match is not None
    return match[1]


# What a user has beside the downloaded folder: transformers, and nothing of ours.
CHECK = """
import sys
assert not {"service", "workers"} & sys.modules.keys()
print(model.config.num_hidden_layers, model.generate(ids, max_new_tokens=40, min_new_tokens=40).shape[1] - ids.shape[1])
"""


def test_the_walk_through_ends_in_a_checkpoint_that_generates(environment: dict[str, str], tmp_path: Path) -> None:
    with pdtrim_up(environment, tmp_path) as url:
        script = block_after("walk-through").replace("http://127.0.0.1:8000", url)
        assert script.count("4}}'") == 1
        script = script.replace("4}}'", f"4}}, {SMALL}")
        walked = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, check=True, timeout=280, stdout=subprocess.PIPE
        )
    events = [line.removeprefix("event: ") for line in walked.stdout.decode().splitlines() if line[:6] == "event:"]
    assert events.count("stage.succeeded") == len(StageName)
    assert events[-1] == "job.succeeded"
    generated = subprocess.run(
        [sys.executable, "-P", "-c", block_after("generate") + CHECK],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert generated.stdout.startswith("def main(")
    assert generated.stdout.splitlines()[-1] == "8 40"


def test_every_setting_is_in_the_configuration_table() -> None:
    documented = set(re.findall(r"`PDTRIM_(\w+)`", README))
    assert documented == {name.upper() for name in Settings.model_fields}
