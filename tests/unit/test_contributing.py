"""What docs/contributing.md says of the rooms and of the hooks is what is run."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def rooms(cell: str) -> set[str]:
    return {name.removesuffix(".py").replace("/", ".") for name in re.findall(r"`([^`]+)`", cell)}


def test_the_rooms_are_the_layers_in_their_order() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [set(line.split(" | ")) for line in contracts[0]["layers"]]
    text = (ROOT / "docs" / "contributing.md").read_text()
    table = text.partition("| room | has |\n|---|---|\n")[2].partition("\n\n")[0]

    assert [rooms(line.split(" | ")[0]) for line in table.splitlines()] == layers


def test_the_hooks_run_what_make_check_runs() -> None:
    needs = dict(re.findall(r"^([a-z-]+): ([a-z -]+?)(?: ##.*)?$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["entry"]: hook["stages"] for hook in repository["hooks"]}

    assert needs["check"].split() == ["lint", "fast"]
    assert hooks == {f"make {target}": ["pre-commit"] for target in needs["lint"].split()} | {"make fast": ["pre-push"]}
