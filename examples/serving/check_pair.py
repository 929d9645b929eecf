"""Says whether runtimes that copy layer k to layer k can serve two checkpoints as a pair; exits with 1 if not.

Call it as `python check_pair.py PREFILL DECODE`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def complaint(prefill: Path, decode: Path) -> str | None:
    """Why not, or None. Raises: OSError for a folder that is no checkpoint of this service."""
    made = [json.loads((folder / "pdtrim.json").read_text()) for folder in (prefill, decode)]
    layers = json.loads((prefill / "config.json").read_text())["num_hidden_layers"]
    roles = [one["role"] for one in made]
    if roles not in (["prefill", "decode"], ["unified", "unified"]):
        return (
            f"these are a {roles[0]} and a {roles[1]} checkpoint; give prefill's and decode's, or a unified one twice"
        )
    if made[0]["job"] != made[1]["job"]:
        return f"they come from different jobs, {made[0]['job']} and {made[1]['job']}"
    if made[1]["kv_layer_map"] != list(range(layers)):
        return (
            f"prefill has {layers} layers, and decode's {len(made[1]['kv_layer_map'])} continue those of "
            f"{made[1]['kv_layer_map']}: the runtime would have to apply this map, and does not"
        )
    return None


if __name__ == "__main__":
    found = complaint(Path(sys.argv[1]), Path(sys.argv[2]))
    print(found or "layer k of decode continues layer k of prefill")
    sys.exit(found is not None)
