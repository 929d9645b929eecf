"""The job of `pdtrim demo`, with questions that the reference model, which has read Python alone, can answer."""

from __future__ import annotations

from typing import Any

OPENED = {
    ")": ("print(value", "f(a, b", "len(line", "open(path, 'rb'", "return (first, second", "os.path.join(root, name"),
    "]": ("items[index", "x = [1, 2, 3", "rows[0", "values[start:stop", "d = {'key': [1, 2", "print(items[0"),
    "}": ("{'name': name", "data = {key: value", "table = {'a': 1, 'b': 2", "{x for x in found"),
}
"""By the bracket that closes it, code in which one is open."""
NAMES = ("count", "path", "name", "index", "value", "size", "text", "key", "data", "node", "offset", "width")

BRACKETS: dict[str, Any] = {
    "task": "bracket",
    "docs": [{"code": code, "bracket": bracket} for bracket, codes in OPENED.items() for code in codes],
    "doc_to_text": "code",
    "doc_to_choice": list(OPENED),
    "doc_to_target": "bracket",
    "target_delimiter": "",
}
GETTERS: dict[str, Any] = {
    "task": "getter",
    "output_type": "generate_until",
    "docs": [{"name": name} for name in NAMES],
    "doc_to_text": "def get_{{name}}(self):\n    return self.",
    "doc_to_target": "{{name}}",
    "generation_kwargs": {"until": ["\n", " ", ".", "("], "max_gen_toks": 4},
}
DEMO_SPEC: dict[str, Any] = {
    "model": "reference",
    "prefill": {"kv_only_blocks": 3},
    "decode": {"remove_blocks": 2},
    "calibration": {"windows": 16, "window_tokens": 128},
    "search": {"evaluations": 60},
    "distillation": {"heal_tokens": 20_480, "threshold": 0.965},
    "evaluation": {
        "speed_tokens": 32,
        "tasks": [BRACKETS, GETTERS],
        "prompts": [
            "import os\n\ndef read_lines(path):\n    with open(path",
            "for name in sorted(os.listdir(path)):\n    if name.endswith(",
        ],
        "sample_tokens": 24,
    },
    "metadata": {"made-by": "pdtrim demo"},
}
