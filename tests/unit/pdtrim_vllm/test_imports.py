"""The plugin stands alone in the image of an engine."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

PLUGIN = Path(__file__).parents[3] / "serving" / "pdtrim_vllm"
BROUGHT_BY_VLLM = {"msgspec", "torch", "vllm", "zmq"}


def test_it_needs_nothing_but_what_vllm_brings() -> None:
    imported = set()
    for path in PLUGIN.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])

    assert imported - sys.stdlib_module_names == BROUGHT_BY_VLLM | {"pdtrim_vllm"}
